"""Linear layers added to a model, split out of one, and multiplied out again."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastkfo
from fastkfo.algorithms import GBML, MAML
from fastkfo.inner_loop.chain import chain_of
from fastkfo.nn import (
    LinNet,
    add_linear_layers,
    collapse,
    collapse_layers,
    split_linear,
)
from fastkfo.training import TrainConfig
from fastkfo.training.methods import build
from tests.cases import needs_native
from tests.oracle import learn2learn

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}
sizes = st.integers(1, 9)


def mlp(bias=True):
    return nn.Sequential(nn.Linear(6, 8, bias), nn.ReLU(), nn.Linear(8, 3, bias)).double()


class Net(nn.Module):
    """A model with its layers in a nest, the output layer registered last."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"first": nn.Linear(6, 7), "norm": nn.LayerNorm(7)})
        self.head = nn.Linear(7, 3, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.body["norm"](self.body["first"](x))))


def shaken(model):
    """Every parameter elsewhere, as after training."""
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.3)
    return model


def assert_same_function(a, b, features=6):
    x = torch.randn(5, features, dtype=torch.float64)
    torch.testing.assert_close(a(x), b(x), **TOLERANCE)


# ------------------------------------------------------------------------------------- properties


@settings(max_examples=80, deadline=None)
@given(
    n=sizes, m=sizes, extra=st.integers(0, 5), depth=st.integers(1, 5), bias=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_split_and_collapse_are_the_same_function(n, m, extra, depth, bias, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(m, n, bias).double()
    deep = split_linear(layer, "", depth, width=min(n, m) + extra)
    assert len(deep) == depth
    assert all((x.bias is not None) == bias for x in deep)
    assert_same_function(deep, layer, m)
    back = collapse(deep)
    assert torch.equal(back.weight, layer.weight), "products with identities are exact"
    assert back.state_dict().keys() == layer.state_dict().keys()
    assert not bias or torch.equal(back.bias, layer.bias)

    assert_same_function(collapse(shaken(deep)), deep, m)


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(sizes, min_size=2, max_size=6),
    biases=st.lists(st.booleans(), min_size=5, max_size=5),
    nest=st.booleans(),
)
def test_any_chain_is_its_product(widths, biases, nest):
    layers = [
        nn.Linear(m, n, b).double()
        for m, n, b in zip(widths[:-1], widths[1:], biases, strict=False)
    ]
    if nest:
        layers = [nn.Identity(), nn.Sequential(*layers[:1], nn.Identity()), *layers[1:]]
    made = collapse_layers(layers)
    assert type(made) is nn.Linear
    assert_same_function(made, nn.Sequential(*layers), widths[0])
    assert (made.bias is None) == (not any(biases[: len(widths) - 1]))


def test_float32_is_rounded_once():
    torch.manual_seed(0)
    deep = LinNet(6, 40)
    exact = collapse_layers(copy.deepcopy(deep).double())
    state = torch.get_rng_state()
    found = collapse(deep)
    assert torch.equal(torch.get_rng_state(), state), "it draws nothing"
    assert found.weight.dtype == torch.float32
    assert torch.equal(found.weight, exact.weight.float())
    assert torch.equal(found.bias, exact.bias.float())


# ----------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("model", [mlp, lambda: mlp(False), lambda: Net().double()])
def test_adding_and_collapsing(model, depth):
    torch.manual_seed(0)
    model = model()
    before = copy.deepcopy(model.state_dict())
    deep = add_linear_layers(model, depth, init="identity")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "not a copy"
    assert_same_function(deep, model)
    count = sum(type(x) is nn.Linear for x in model.modules())
    assert sum(type(x) is nn.Linear for x in deep.modules()) == count + depth
    shaken(deep)
    flat = collapse(deep)
    assert_same_function(flat, deep)
    assert list(flat.state_dict()) == list(before)
    model.load_state_dict(flat.state_dict())
    assert_same_function(model, deep)


def test_default_keeps_the_layer_and_draws_as_linear_does():
    model = mlp()
    torch.manual_seed(3)
    deep = add_linear_layers(model, 2)
    torch.manual_seed(3)
    for added in deep[2][:2]:
        drawn = nn.Linear(8, 8, dtype=torch.float64)
        assert torch.equal(added.weight, drawn.weight)
        assert torch.equal(added.bias, drawn.bias)
    assert torch.equal(deep[2][2].weight, model[2].weight)

    torch.manual_seed(3)
    deep = split_linear(model, "0", 2, width=4, init="default")
    torch.manual_seed(3)
    assert torch.equal(deep[0][0].weight, nn.Linear(6, 4, dtype=torch.float64).weight)
    assert torch.equal(deep[0][1].weight, nn.Linear(4, 8, dtype=torch.float64).weight)

    torch.manual_seed(3)
    plain = LinNet(3, 6, 2, width=5, init="identity", dtype=torch.float64)
    assert torch.equal(plain[0].weight, torch.eye(5, 6, dtype=torch.float64))
    assert plain[1].bias.count_nonzero() == 0
    assert plain[2].weight.shape == (2, 5)
    assert plain[2].weight.count_nonzero() == 10


def test_by_name_twice_and_in_two_places():
    model = split_linear(Net().double(), "body.first", 2)
    assert isinstance(model.body["first"], LinNet)
    model = split_linear(model, "body.first.1", 3)  # a factor of a factor
    assert_same_function(collapse(shaken(model)), model)
    assert list(collapse(model).state_dict()) == list(Net().state_dict())

    shared = LinNet(2, 6, dtype=torch.float64)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    flat = collapse(model)
    assert flat[0] is flat[2]
    assert_same_function(flat, model)


def test_what_a_layer_was_stays():
    model = fastkfo.nn.freeze(mlp()).eval()
    for deep in (split_linear(model, "2", 3), add_linear_layers(model, 2)):
        for result in (deep, collapse(deep)):
            assert not any(p.requires_grad for p in result.parameters())
            assert not any(x.training for x in result[2].modules())
            assert {p.dtype for p in result.parameters()} == {torch.float64}
    assert next(collapse(split_linear(mlp(), "2", 2))[2].parameters()).requires_grad


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_weight_and_bias_are_frozen_one_by_one(frozen):
    model = mlp()
    getattr(model[2], frozen).requires_grad_(False)
    for deep in (
        add_linear_layers(model, 2), split_linear(model, "2", 3),
        split_linear(model, "2", 3, init="default"),
    ):  # fmt: skip
        for layer in (*deep[2], collapse(deep)[2]):
            for name, p in layer.named_parameters():
                assert p.requires_grad == (name != frozen), name
        assert all(p.requires_grad for p in deep[0].parameters())


def test_nests_that_collapse():
    a, b, c = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))
    plain = nn.Sequential(a, b, c)
    layers = nn.ModuleList([a, nn.ModuleList([b]), nn.Identity(), c])
    for nest in (layers, [[a, (b,)], c], (x for x in plain)):
        assert_same_function(collapse_layers(nest), plain, 4)


def test_it_pickles_slices_and_copies():
    deep = split_linear(mlp(), "0", 4)
    again = pickle.loads(pickle.dumps(deep))
    assert_same_function(again, deep)
    assert_same_function(collapse(again), deep)
    assert type(deep[0][1:3]) is nn.Sequential
    assert deep[0][1:3][0] is deep[0][1]
    assert_same_function(learn2learn().clone_module(deep), deep)


# ------------------------------------------------------------------------------------- inner loop


def batch(tasks=3):
    x_s, x_q = torch.randn(2, tasks, 6, 6, dtype=torch.float64)
    y_s, y_q = torch.randint(3, (2, tasks, 6))
    return x_s, y_s, x_q, y_q


def learners(model):
    transform = fastkfo.optim.KroneckerTransform(fastkfo.nn.KroneckerLinear)
    yield MAML(model, lr=0.1)
    yield GBML(model, transform=transform, lr=0.1)
    yield GBML(model, transform=transform, lr=0.1, adapt_transform=True)


@needs_native
@pytest.mark.parametrize("kind", range(3), ids=["maml", "kfo", "kfo-adapt"])
def test_fused_and_batched_are_the_loop(kind):
    torch.manual_seed(0)
    deep = add_linear_layers(split_linear(mlp(), "0", 3), 2)
    data, found = batch(), []
    for backend in ("fused", "batched", "loop"):
        learner = list(learners(copy.deepcopy(deep)))[kind]
        inner_loop = fastkfo.InnerLoop(learner, F.cross_entropy, 3, backend=backend)
        inner_loop(*data).loss.mean().backward()
        found.append([p.grad for p in learner.parameters()])
    for other in found[:2]:
        torch.testing.assert_close(other, found[2], rtol=1e-10, atol=1e-12)
    # Like the plain sequence it is: the same layers, in one sequence.
    flat = nn.Sequential(*deep[0], deep[1], *deep[2])
    inner_loop = fastkfo.InnerLoop(list(learners(flat))[kind], F.cross_entropy, 3)
    assert inner_loop.why_not_fused() is None
    inner_loop(*data).loss.mean().backward()
    grads = [p.grad for p in inner_loop.learner.parameters()]
    for a, b in zip(grads, found[0], strict=True):
        torch.testing.assert_close(a, b)


def test_batched_needs_no_vmap():
    assert len(chain_of(split_linear(mlp(), "0", 3))) == 5


@pytest.mark.parametrize("kind", range(3), ids=["maml", "kfo", "kfo-adapt"])
def test_adapted_factors_collapse(kind):
    torch.manual_seed(0)
    x_s, y_s, x_q, _ = (t[0] for t in batch())
    learner = list(learners(add_linear_layers(mlp(), 3)))[kind].clone()
    for _ in range(3):
        learner.adapt(F.cross_entropy(learner(x_s), y_s))
    flat = collapse(learner.module)
    assert list(flat.state_dict()) == list(mlp().state_dict())
    assert all(p.is_leaf for p in flat.parameters())
    torch.testing.assert_close(flat(x_q), learner(x_q), **TOLERANCE)


def test_a_step_is_transformed_by_the_factors():
    """The module's docstring: W moves by −α (W_2 W_2ᵀ G + G W_1ᵀ W_1), to first order in α."""
    torch.manual_seed(0)
    deep = LinNet(2, 6, 3, width=4, bias=False, dtype=torch.float64)
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    one, two = (layer.weight.detach() for layer in deep)
    w = (two @ one).requires_grad_()
    g = torch.autograd.grad(F.mse_loss(x @ w.T, y), w)[0]
    rate = 1e-6
    learner = MAML(deep, lr=rate).clone()
    learner.adapt(F.mse_loss(learner(x), y))
    moved = (collapse(learner.module).weight - w) / rate
    torch.testing.assert_close(moved, -(two @ two.T @ g + g @ one.T @ one), rtol=1e-4, atol=1e-6)


def test_training_method_collapses_to_maml():
    options = {"iterations": 1, "linear_layers": 2, "dtype": "float64", "backbone": "mlp-9x7"}
    models = {
        method: build(TrainConfig(method=method, **options), (1, 8, 8), 5, False).learner.module
        for method in ("maml", "maml-linnet")
    }
    deep = models["maml-linnet"]
    flat = collapse(shaken(deep))
    assert list(flat.state_dict()) == list(models["maml"].state_dict())
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(flat(x), deep(x), **TOLERANCE)
