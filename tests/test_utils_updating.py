"""update_module and replace_parameters against learn2learn's own, and where it fails."""

import pytest
import torch
from torch import nn

from fastkfo import utils
from tests.oracle import learn2learn
from tests.utils_models import (
    DTYPES,
    MODELS,
    GradBuffer,
    Recurrent,
    Tied,
    assert_all_equal,
    data,
    two_models,
)

l2l = learn2learn()


@pytest.fixture(params=list(MODELS))
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().double()


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
