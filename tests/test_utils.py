"""fastkfo.utils against learn2learn's own, and where learn2learn fails."""

import argparse
import dataclasses
import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import AffineTransform, Independent, Normal, TransformedDistribution

from fastkfo import utils
from tests.oracle import learn2learn

l2l = learn2learn()


class Tied(nn.Module):
    """A weight used twice, and a submodule used twice."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.c = nn.Linear(4, 4)
        self.again = self.c

    def forward(self, x):
        return self.again(torch.tanh(self.c(self.b(torch.tanh(self.a(x))))))


class GradBuffer(nn.Module):
    """One buffer in the graph, one outside."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4, requires_grad=True))
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x):
        return self.lin(x) * self.scale + self.count


class Recurrent(nn.Module):
    """An LSTM and a head."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 3, num_layers=2)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.rnn(x.unsqueeze(0))[0][0])


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False))


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


MODELS = {"mlp": mlp, "cnn": cnn, "tied": Tied, "grad-buffer": GradBuffer, "lstm": Recurrent}
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(params=list(MODELS))
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().double()


def two_models(name, dtype=torch.float64):
    """Return twice the same model, with the same weights."""
    torch.manual_seed(0)
    first = MODELS[name]().to(dtype)
    torch.manual_seed(0)
    second = MODELS[name]().to(dtype)
    if name == "grad-buffer":  # .to() made it a non-leaf where it changed the dtype
        for m in (first, second):
            m.scale = m.scale.detach().requires_grad_()
    return first, second


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, generator=generator, dtype=dtype)


def assert_all_equal(got, expected):
    got, expected = list(got), list(expected)
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=0)


# ------------------------------------------------------------------------------ names, small ones


@pytest.mark.parametrize(
    "name",
    [
        "magic_box",
        "clone_parameters",
        "clone_named_parameters",
        "clone_module",
        "detach_module",
        "update_module",
        "clone_distribution",
        "detach_distribution",
        "accuracy",
        "flatten_config",
    ],
)
def test_signatures_are_learn2learns(name):
    ours = inspect.signature(getattr(utils, name)).parameters.values()
    theirs = inspect.signature(getattr(l2l.utils, name)).parameters.values()
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def test_magic_box():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y = utils.magic_box(x)
    assert_all_equal([y], [torch.ones_like(x)])
    for _ in range(3):  # every derivative is 1 again
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert_all_equal([y], [torch.ones_like(x)])
    assert_all_equal([utils.magic_box(x)], [l2l.utils.magic_box(x)])
    assert utils.magic_box("x") == "x"


def test_clone_parameters():
    params = list(mlp().parameters())
    clones = utils.clone_parameters(params)
    assert_all_equal(clones, params)
    assert all(c.grad_fn is not None for c in clones)
    named = utils.clone_named_parameters(dict(mlp().named_parameters()))
    assert list(named) == ["0.weight", "0.bias", "2.weight"]
    assert all(c.grad_fn is not None for c in named.values())


def test_accuracy():
    preds, targets = torch.randn(7, 3), torch.randint(3, (7,))
    for t in (targets, targets.double()):
        result = utils.accuracy(preds, t)
        assert result == l2l.utils.accuracy(preds, t)
        assert result.dtype == torch.float32


@dataclasses.dataclass
class Inner:
    lr: float = 0.1
    sizes: tuple = (1, 2)


@dataclasses.dataclass
class Outer:
    name: str = "kfo"
    inner: Inner = dataclasses.field(default_factory=Inner)
    extra: dict = dataclasses.field(default_factory=lambda: {"seed": 3})


def test_flatten_config():
    flat = {"name": "kfo", "inner.lr": 0.1, "inner.sizes": (1, 2), "extra.seed": 3}
    assert utils.flatten_config(Outer()) == flat
    assert utils.flatten_config(argparse.Namespace(**vars(Outer()))) == flat
    nested = {"run": argparse.Namespace(config=Outer()), "empty": {}, "none": None}
    expected = {f"run.config.{k}": v for k, v in flat.items()}
    assert utils.flatten_config(nested) == {**expected, "none": None}
    assert utils.flatten_config({"a": 1}, prefix="p") == {"p.a": 1}
    assert utils.flatten_config({"cls": Inner}) == {"cls": Inner}


def test_flatten_config_errors():
    with pytest.raises(TypeError, match=r"args: expected a dict.* got int"):
        utils.flatten_config(3)
    with pytest.raises(TypeError, match=r"args: expected string keys, got 1 \(int\)"):
        utils.flatten_config({"a": {1: 2}})
    with pytest.raises(ValueError, match=r"args: expected distinct dotted keys, got \['a\.b'\]"):
        utils.flatten_config({"a": {"b": 1}, "a.b": 2})


def test_warn_once():
    warn = type(utils.warn_once)()
    with pytest.warns(UserWarning, match="one"):
        warn("one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn("one")
    with pytest.warns(DeprecationWarning, match="two"):
        warn("two", severity="deprecation")
    with pytest.warns(FutureWarning, match="three"):
        warn("three", FutureWarning)
    with pytest.raises(RuntimeError, match="four"):
        warn("four", severity="error")
    with pytest.raises(ValueError, match=r"severity: expected one of .* got 'loud'"):
        warn("five", severity="loud")


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


# ----------------------------------------------------------------------------------- update_module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(MODELS))
def test_second_order_step_matches_learn2learn(name, dtype):
    results = []
    for module, model in zip((utils, l2l.utils), two_models(name, dtype), strict=True):
        x = data(dtype)
        clone = module.clone_module(model)
        for _ in range(2):
            params = list(clone.parameters())
            grads = torch.autograd.grad(clone(x).pow(2).mean(), params, create_graph=True)
            returned = module.update_module(clone, updates=[-0.1 * g for g in grads])
            assert returned is clone
        loss = (clone(x) - 1).pow(2).mean()
        params = list(model.parameters())
        results.append([loss, *clone.parameters(), *torch.autograd.grad(loss, params)])
    assert_all_equal(*results)


def test_update_attributes(model):
    """The .update attribute of parameters and buffers, as in learn2learn."""
    results = []
    for module in (utils, l2l.utils):
        clone = utils.clone_module(model)
        tensors = [*clone.parameters(), *(b for b in clone.buffers() if b.is_floating_point())]
        for i, tensor in enumerate(tensors):
            if i % 2 == 0:
                tensor.update = torch.full_like(tensor, 0.5)
        module.update_module(clone)
        assert all(t.update is None for t in tensors[::2])
        results.append([*clone.parameters(), *clone.buffers()])
    assert_all_equal(*results)


def test_update_list_takes_precedence_over_attributes():
    for module in (utils, l2l.utils):
        model = nn.Linear(2, 2)
        weight, bias = model.weight, model.bias
        weight.update = bias.update = torch.full((2, 2), 99.0)
        module.update_module(model, updates=[None, torch.ones(2)])
        assert model.weight is weight
        assert_all_equal([model.bias], [bias + 1])
        assert weight.update is None
        assert bias.update is None


def test_update_accepts_any_iterable():
    model = nn.Linear(2, 2)
    before = [p.clone() for p in model.parameters()]
    utils.update_module(model, (torch.ones_like(p) for p in model.parameters()))
    assert_all_equal(model.parameters(), [b + 1 for b in before])


def test_update_keeps_ties():
    model = Tied()
    utils.update_module(model, [torch.ones_like(p) for p in model.parameters()])
    assert model.a.weight is model.b.weight
    assert model.c is model.again


def test_update_memo_ties_across_calls():
    for module in (utils, l2l.utils):
        a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        b.weight = weight = a.weight
        memo = {}
        module.update_module(a, [torch.ones(2, 2), None], memo)
        module.update_module(b, [None, torch.ones(2)], memo=memo)
        assert a.weight is b.weight is memo[weight]


def test_update_none_submodules():
    model = nn.Sequential(nn.Linear(2, 2))
    model.add_module("nothing", None)
    before = model[0].bias.clone()
    utils.update_module(model, [None, torch.ones(2)])
    assert_all_equal([model[0].bias], [before + 1])


def test_update_in_lower_precision_is_allowed():
    """Autocast makes such updates; the sum has the parameter's dtype."""
    model = nn.Linear(2, 2)
    utils.update_module(model, [torch.ones(2, 2, dtype=torch.bfloat16), None])
    assert model.weight.dtype == torch.float32


BAD_UPDATES = {
    "too few": (lambda ps: [None], ValueError, "updates: expected 2 entries.* got 1"),
    "too many": (lambda ps: [None] * 3, ValueError, "updates: expected 2 entries.* got 3"),
    "shape": (
        lambda ps: [torch.ones_like(ps[0]), torch.ones(1)],
        ValueError,
        r"updates: expected for 'bias' shape \(3,\), got \(1,\)",
    ),
    "dtype": (
        lambda ps: [torch.ones_like(ps[0]), torch.ones(3, dtype=torch.float64)],
        ValueError,
        r"updates: expected for 'bias' dtype torch\.float32, got torch\.float64",
    ),
    "device": (
        lambda ps: [torch.ones_like(ps[0]), torch.ones(3, device="meta")],
        ValueError,
        r"updates: expected for 'bias' device cpu, got meta",
    ),
    "number": (
        lambda ps: [torch.ones_like(ps[0]), 0.5],
        TypeError,
        "updates: expected for 'bias' a Tensor or None, got float",
    ),
    "one tensor": (lambda ps: torch.ones(2, 3), TypeError, "updates: expected a list.*got Tensor"),
    "no list": (lambda ps: 3, TypeError, "updates: expected a list.*got int"),
}


@pytest.mark.parametrize("case", list(BAD_UPDATES))
def test_bad_updates_change_nothing(case):
    make, error, message = BAD_UPDATES[case]
    model = nn.Linear(2, 3)
    params = list(model.parameters())
    params[0].update = stale = torch.ones(3, 2)
    with pytest.raises(error, match=message):
        utils.update_module(model, make(params))
    assert all(p is q for p, q in zip(model.parameters(), params, strict=True))
    assert params[0].update is stale


def test_update_of_no_module():
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module, got NoneType"):
        utils.update_module(None)


# ------------------------------------------------------------------------------ replace_parameters


def test_replace_parameters(model):
    clone = utils.clone_module(model)
    tensors = [*clone.parameters(), *(b for b in clone.buffers() if b.requires_grad)]
    new = {id(t): t + 1 for t in tensors}
    names = [n for n, _ in clone.named_parameters()]
    utils.replace_parameters(clone, new)
    assert [n for n, _ in clone.named_parameters()] == names
    expected = list(new.values())
    assert all(p is e for p, e in zip(clone.parameters(), expected, strict=False))
    x = data()
    reference = utils.update_module(
        utils.clone_module(model), [torch.ones_like(p) for p in model.parameters()]
    )
    if isinstance(model, GradBuffer):
        reference.scale = reference.scale + 1
    assert_all_equal([clone(x)], [reference(x)])


@pytest.mark.parametrize("module", [utils, l2l.utils], ids=["ours", "learn2learn"])
def test_updates_refresh_flat_weights(module):
    clone = utils.clone_module(Recurrent())
    module.update_module(clone, [torch.ones_like(p) for p in clone.parameters()])
    rnn = clone.rnn
    assert all(
        w is rnn._parameters[n]
        for w, n in zip(rnn._flat_weights, rnn._flat_weights_names, strict=True)
    )


def test_replace_parameters_swaps_once():
    shared = nn.Linear(2, 2, bias=False)
    model = nn.ModuleList([shared, other := nn.Linear(2, 2, bias=False), shared])
    a, b = shared.weight, other.weight
    utils.replace_parameters(model, {id(a): b, id(b): a})
    assert shared.weight is b
    assert other.weight is a


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


# ----------------------------------------------------------------------------------- distributions


def test_clone_distribution_matches_learn2learn():
    loc = torch.zeros(3, requires_grad=True)
    dist = Normal(loc, torch.ones(3))
    x = torch.ones(3)
    for module in (utils, l2l.utils):
        clone = module.clone_distribution(dist)
        assert type(clone) is Normal
        assert clone.loc is not dist.loc
        assert clone.scale is not dist.scale
        (g,) = torch.autograd.grad(clone.log_prob(x).sum(), loc)
        assert_all_equal([g], [x])


def test_clone_nested_distribution_inside_a_graph():
    loc = torch.zeros(3, requires_grad=True)
    shift = torch.ones(3, requires_grad=True)
    base = Independent(Normal(loc * 2, torch.ones(3)), 1)
    dist = TransformedDistribution(base, [AffineTransform(shift * 3, 1.0)])
    dist.net = nn.Linear(3, 3)
    clone = utils.clone_distribution(dist)
    x = torch.randn(3)
    grads = torch.autograd.grad(clone.log_prob(x), (loc, shift), retain_graph=True)
    assert_all_equal(grads, torch.autograd.grad(dist.log_prob(x), (loc, shift)))
    assert clone.net is not dist.net
    assert clone.net.weight.grad_fn is not None
    assert clone.base_dist.base_dist.loc is not dist.base_dist.base_dist.loc


def test_detach_distribution():
    loc = torch.zeros(3, requires_grad=True)
    dist = Independent(Normal(loc, torch.ones(3)), 1)
    dist.net = utils.clone_module(net := nn.Linear(3, 3))
    assert utils.detach_distribution(dist) is dist
    assert not dist.log_prob(torch.ones(3)).requires_grad
    assert isinstance(dist.net, nn.Linear)  # learn2learn leaves None here
    assert not dist.net.weight.requires_grad
    assert net.weight.requires_grad
    assert loc.requires_grad
    flow = TransformedDistribution(Normal(loc, 1.0), [AffineTransform(loc * 2, 1.0)])
    assert not utils.detach_distribution(flow).log_prob(torch.ones(3)).requires_grad


def test_maml_like_loop_matches_learn2learn_on_a_classifier():
    """Three tasks, three steps, one accumulated meta-gradient: bit for bit."""
    results = []
    for module in (utils, l2l.utils):
        torch.manual_seed(0)
        model = cnn().double()
        for task in range(3):
            x = data() + task
            y = torch.arange(6) % 4
            clone = module.clone_module(model)
            for _ in range(3):
                loss = F.cross_entropy(clone(x), y)
                grads = torch.autograd.grad(loss, list(clone.parameters()), create_graph=True)
                module.update_module(clone, [-0.5 * g for g in grads])
            F.cross_entropy(clone(x), y).backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert_all_equal(*results)
