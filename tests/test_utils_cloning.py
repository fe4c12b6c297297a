"""clone_module and detach_module against learn2learn's own, and where it fails."""

import pytest
import torch
from torch import nn

from fastkfo import utils
from tests.oracle import learn2learn
from tests.utils_models import MODELS, GradBuffer, Tied, assert_all_equal, cnn, data, two_models

l2l = learn2learn()


@pytest.fixture(params=list(MODELS))
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().double()


# ------------------------------------------------------------------------------------ clone_module


def test_clone_is_differentiable(model):
    x = data()
    ours, theirs = utils.clone_module(model), l2l.clone_module(model)
    assert type(ours) is type(model)
    assert_all_equal(ours.state_dict().values(), theirs.state_dict().values())
    assert list(ours.state_dict()) == list(theirs.state_dict()) == list(model.state_dict())
    params = list(model.parameters())
    grads = torch.autograd.grad(ours(x).pow(2).sum(), params)
    assert_all_equal(grads, torch.autograd.grad(theirs(x).pow(2).sum(), params))


def test_clone_of_a_clone(model):
    x, params = data(), list(model.parameters())
    ours = utils.clone_module(utils.clone_module(model))
    grads = torch.autograd.grad(ours(x).pow(2).sum(), params)
    assert_all_equal(grads, torch.autograd.grad(model(x).pow(2).sum(), params))


def test_clone_keeps_ties_and_shares_nothing_else():
    for module in (utils, l2l.utils):
        clone = module.clone_module(model := Tied())
        assert clone.a.weight is clone.b.weight
        assert clone.a.weight is not model.a.weight
        # A shared submodule becomes two objects with tied parameters.
        assert clone.c is not clone.again
        assert clone.c.weight is clone.again.weight
        assert len(list(clone.parameters())) == len(list(model.parameters()))


def test_clone_ties_by_identity_not_by_storage():
    model = nn.Linear(3, 3)
    model.register_parameter("alias", nn.Parameter(model.weight.data))
    clone = utils.clone_module(model)
    assert clone.weight is not clone.alias


def test_clone_memo_ties_across_calls():
    for module in (utils, l2l.utils):
        a, b = nn.Linear(3, 3), nn.Linear(3, 3)
        b.weight = a.weight
        memo = {}
        clone_a, clone_b = module.clone_module(a, memo), module.clone_module(b, memo=memo)
        assert clone_a.weight is clone_b.weight
        assert clone_a.bias is not clone_b.bias


def test_clone_shares_buffers_outside_the_graph():
    model = cnn()
    clone = utils.clone_module(model)
    assert clone[2].running_mean is model[2].running_mean
    clone(data(torch.float32))
    assert model[2].num_batches_tracked == 1
    model = GradBuffer()
    clone = utils.clone_module(model)
    assert clone.count is model.count
    assert clone.scale is not model.scale
    assert clone.scale.grad_fn is not None


def test_clone_is_independent():
    model = cnn()
    clone = utils.clone_module(model)
    clone.eval()
    clone.add_module("new", nn.ReLU())
    clone[3].register_buffer("buffer", torch.zeros(1))
    clone[3].attribute = 1
    clone[1].weight = None
    assert all(m.training for m in model.modules())
    assert len(model) == 6
    assert not model[3]._buffers
    assert not hasattr(model[3], "attribute")
    assert model[1].weight is not None


def test_clone_rebinds_its_own_methods():
    class Chosen(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.function = self.double
            self.forward = self.run

        def double(self, x):
            return 2 * super().forward(x)

        def run(self, x):
            return self.function(x)

    model = Chosen()
    clone = utils.clone_module(model)
    utils.update_module(clone, [torch.ones_like(p) for p in clone.parameters()])
    x = torch.ones(1, 2)
    torch.testing.assert_close(clone(x), model(x) + 2 * 3)


def test_clone_frozen_parameters():
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    clone = utils.clone_module(model)
    assert not clone.weight.requires_grad
    assert clone.weight is not model.weight
    assert clone.bias.requires_grad


def test_clone_none_submodule_and_custom_flatten_parameters():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2, 2)
            self.add_module("nothing", None)
            self.flatten_parameters()

        def flatten_parameters(self):
            self.flat = [self.lin.weight]

        def _apply(self, fn, recurse=True):
            super()._apply(fn, recurse)
            self.flatten_parameters()
            return self

    clone = utils.clone_module(nn.Sequential(model := Flat()))
    assert clone[0].nothing is None
    assert clone[0].flat[0] is clone[0].lin.weight
    assert model.flat[0] is model.lin.weight


@pytest.mark.parametrize("thing", [None, 3, "x", torch.zeros(1)])
def test_clone_returns_other_things(thing):
    assert utils.clone_module(thing) is thing


def compiled_models():
    inner = nn.Linear(2, 2)
    yield "torch.compile", torch.compile(inner), r"result of torch\.compile"
    by_method = nn.Linear(2, 2)
    by_method.compile()
    yield "m.compile()", by_method, r"\.compile\(\) was called"
    by_forward = nn.Linear(2, 2)
    by_forward.forward = torch.compile(by_forward.forward)
    yield "forward", by_forward, "forward was replaced by a compiled function"
    yield "script", torch.jit.script(nn.Linear(2, 2)), "TorchScript"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_models_are_refused():
    for _, compiled, reason in compiled_models():
        for model in (compiled, nn.Sequential(nn.ReLU(), nn.Sequential(compiled))):
            with pytest.raises(
                TypeError, match=rf"clone_module: .* got a compiled \w+ \(.*{reason}"
            ):
                utils.clone_module(model)
            with pytest.raises(TypeError, match=rf"my_argument: .*{reason}"):
                utils.check_not_compiled(model, "my_argument")


def test_check_not_compiled_passes():
    utils.check_not_compiled(cnn(), "model")


# ----------------------------------------------------------------------------------- detach_module


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_detach_matches_learn2learn(name, keep):
    states = []
    for module, model in zip((utils, l2l.utils), two_models(name), strict=True):
        clone = utils.clone_module(model)
        assert module.detach_module(clone, keep_requires_grad=keep) is None
        tensors = [*clone.parameters(), *clone.buffers()]
        assert all(t.grad_fn is None for t in tensors)
        states.append([t.requires_grad for t in tensors])
        assert all(p.requires_grad for p in model.parameters())
        if keep:
            clone(data()).sum().backward()
            assert all(p.grad is not None for p in clone.parameters())
            assert all(p.grad is None for p in model.parameters())
    assert states[0] == states[1]


@pytest.mark.parametrize("keep", [False, True])
def test_detach_views(keep):
    """Views cannot be detached in place; learn2learn raises here."""
    model = Tied()
    utils.replace_parameters(model, {id(p): p.clone().view_as(p) for p in model.parameters()})
    utils.detach_module(model, keep_requires_grad=keep)
    assert all(p.is_leaf and p.requires_grad is keep for p in model.parameters())
    assert model.a.weight is model.b.weight


def test_detach_ignores_other_things():
    assert utils.detach_module(None) is l2l.detach_module(None) is None
    assert utils.detach_module(3) is None
