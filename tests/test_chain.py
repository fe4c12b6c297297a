"""chain_of: known layers run on `[T, S, ...]` give what a loop over tasks gives."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules import module as module_globals
from torch.nn.utils import parametrizations

from fastkfo.inner_loop.chain import chain_of
from fastkfo.nn import Flatten
from tests.dense import assert_near, derivatives

T, S = 3, 5


def shared():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


ELEMENTWISE = {
    "relu": nn.ReLU(),
    "relu_inplace": nn.ReLU(inplace=True),
    "leaky_relu": nn.LeakyReLU(0.3),
    "leaky_relu_inplace": nn.LeakyReLU(0.3, inplace=True),
    "elu": nn.ELU(0.7),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "softplus": nn.Softplus(2.0, 0.5),
    "identity": nn.Identity(),
    "dropout_of_nothing": nn.Dropout(0.0),
    "dropout_in_eval": nn.Dropout(0.5).eval(),
}
MODELS = {
    **{name: (lambda f=f: nn.Sequential(nn.Linear(4, 3), f)) for name, f in ELEMENTWISE.items()},
    **{f"only_{name}": (lambda f=f: f) for name, f in ELEMENTWISE.items()},
    "linear": lambda: nn.Linear(4, 3),
    "no_bias": lambda: nn.Linear(4, 3, bias=False),
    "one_number": lambda: nn.Linear(4, 1),
    "mlp": lambda: nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 2, bias=False)),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(4, 3)), nn.SiLU(), nn.Sequential(nn.Sequential(nn.Linear(3, 2)))
    ),
    "same_layer_twice": shared,
    "empty": lambda: nn.Sequential(),
}
FLATTENED = {
    "nn_flatten": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 2)),
    "own_flatten": lambda: nn.Sequential(Flatten(), nn.Linear(12, 2)),
    "only_flatten": lambda: Flatten(),
    "late": lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 2)),
}


def with_tasks(model):
    """The model in float64, a loop over tasks of it, and a copy that holds `[T, ...]`."""
    model = model.double()
    names = [name for name, _ in model.named_parameters()]
    stacked = [
        torch.randn(T, *p.shape).double().requires_grad_() for _, p in model.named_parameters()
    ]
    given = dict(zip(names, stacked, strict=True))

    def loop(x):
        return torch.stack(
            [
                functional_call(model, {name: p[t] for name, p in given.items()}, (x[t] * 1,))
                for t in range(T)
            ]
        )

    batched = copy.deepcopy(model)
    for name, p in given.items():
        owner, _, last = name.rpartition(".")
        batched.get_submodule(owner)._parameters[last] = p
    return batched, loop, stacked


def compare(model, x):
    batched, loop, stacked = with_tasks(model)
    layers = chain_of(batched)
    assert layers is not None

    def chain(x):
        for layer in layers:
            x = layer(x)
        return x

    x = x.double().requires_grad_()
    results = []
    for f in (chain, loop):
        y = f(x * 1)  # not the leaf itself: some work in place
        results.append([y, *derivatives([y], [x, *stacked], 2)])
    for k, (a, e) in enumerate(zip(*results, strict=True)):
        assert_near(a, e, 1e-10, f"[{k}]")


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("shape", [(T, S, 4), (T, 1, 4), (T, S, 2, 4)], ids=str)
def test_as_a_loop(model, shape):
    compare(model(), torch.randn(shape))


@pytest.mark.parametrize("model", FLATTENED.values(), ids=FLATTENED)
@pytest.mark.parametrize("shape", [(T, S, 6, 2), (T, S, 2, 3, 2), (T, 1, 6, 2)], ids=str)
def test_flatten(model, shape):
    compare(model(), torch.randn(shape))


@pytest.mark.parametrize("layout", ["transposed", "gaps", "one_for_all_tasks", "permuted"])
def test_layouts_of_inputs(layout):
    x = {
        "transposed": lambda: torch.randn(T, 4, S).mT,
        "gaps": lambda: torch.randn(T, S, 8)[..., ::2],
        "one_for_all_tasks": lambda: torch.randn(S, 4).expand(T, S, 4),
        "permuted": lambda: torch.randn(4, 2, S, T).permute(3, 2, 1, 0),
    }[layout]()
    compare(MODELS["mlp"](), x)


def test_rows_of_tasks_stay_apart():
    batched, _, _ = with_tasks(nn.Linear(4, 3))
    (linear,) = chain_of(batched)
    x = torch.randn(T, S, 4).double()
    clean = linear(x)
    x[1] = torch.nan
    assert torch.equal(linear(x)[[0, 2]], clean[[0, 2]])


def test_no_samples():
    batched, loop, _ = with_tasks(nn.Linear(4, 3))
    (linear,) = chain_of(batched)
    x = torch.randn(T, 0, 4).double()
    assert linear(x).shape == loop(x).shape == (T, 0, 3)


def test_layers_read_parameters_when_they_are_called():
    batched, _, _ = with_tasks(nn.Linear(4, 3, bias=False))
    (linear,) = chain_of(batched)
    other = torch.randn(T, 3, 4).double()
    batched._parameters["weight"] = other
    x = torch.randn(T, S, 4).double()
    assert_near(linear(x), x @ other.mT, 1e-14)


def test_dropout_in_train():
    """Half of the numbers is zero, the others doubled; every task draws its own."""
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.5))
    layers = chain_of(model)
    x = torch.ones(T, 40, 50, requires_grad=True)
    y = layers[1](layers[0](x))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert ((y == 0).float().mean((1, 2)) - 0.5).abs().max() < 0.1  # nine standard deviations
    assert not torch.equal(y[0], y[1])
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g, y)
    model.eval()  # layers follow the model's mode
    assert torch.equal(layers[1](x), x)


def test_dropout_of_everything():
    (dropout,) = chain_of(nn.Dropout(1.0))
    assert not dropout(torch.ones(T, S, 4)).any()


class MyLinear(nn.Linear):
    pass


class MySequential(nn.Sequential):
    pass


class MyReLU(nn.ReLU):
    pass


class MyFlatten(nn.Flatten):
    pass


def hooked(register, layer):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    target = model if layer is None else model[layer]
    getattr(target, register)(lambda *args: None)
    return model


def with_forward():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    model[1].forward = lambda x: 2 * x
    return model


HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)
UNKNOWN = {
    "linear_subclass": lambda: MyLinear(4, 3),
    "sequential_subclass": lambda: MySequential(nn.Linear(4, 3)),
    "relu_subclass": lambda: nn.Sequential(nn.Linear(4, 3), MyReLU()),
    "flatten_subclass": lambda: MyFlatten(),
    "convolution": lambda: nn.Conv1d(4, 3, 1),
    "batch_norm": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
    "layer_norm": lambda: nn.LayerNorm(4),
    "softmax": lambda: nn.Softmax(-1),
    "prelu": lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU()),
    "dropout_of_channels": lambda: nn.Dropout1d(0.5),
    "bilinear": lambda: nn.Bilinear(4, 4, 3),
    "lazy_linear": lambda: nn.LazyLinear(3),
    "list": lambda: nn.ModuleList([nn.Linear(4, 3)]),
    "unknown_inside": lambda: nn.Sequential(nn.Sequential(nn.Tanh(), nn.Softmax(-1))),
    "flatten_of_some_axes": lambda: nn.Flatten(1, 2),
    "flatten_from_another_axis": lambda: nn.Flatten(2),
    "flatten_of_all": lambda: nn.Flatten(0),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "weight_norm_inside": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "forward_of_the_instance": with_forward,
    **{
        f"{hook.removeprefix('register_')}_{'of_all' if layer is None else layer}": (
            lambda hook=hook, layer=layer: hooked(hook, layer)
        )
        for hook in HOOKS
        for layer in (None, 0, 1)
    },
}


@pytest.mark.parametrize("model", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_exactly_known(model):
    assert chain_of(model()) is None


def test_a_layer_that_is_missing():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    model._modules["1"] = None
    assert chain_of(model) is None


def test_a_weight_that_is_no_parameter():
    """Made a buffer to freeze it: then it has no axis of tasks."""
    layer = nn.Linear(4, 3)
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    assert chain_of(layer) is None


@pytest.mark.parametrize("register", [f"register_module_{hook[9:]}" for hook in HOOKS])
def test_hooks_of_all_modules(register):
    handle = getattr(module_globals, register)(lambda *args: None)
    try:
        assert chain_of(nn.Linear(4, 3)) is None
    finally:
        handle.remove()
    assert len(chain_of(nn.Linear(4, 3))) == 1


def test_a_hook_that_was_removed():
    layer = nn.Linear(4, 3)
    layer.register_forward_hook(lambda *args: None).remove()
    assert chain_of(layer) is not None


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [(T, S, 5), (T, S, 4, 3), (T, S, 1)], ids=str)
def test_wrong_number_of_features(shape, bias):
    batched, _, _ = with_tasks(nn.Linear(4, 3, bias=bias))
    (linear,) = chain_of(batched)
    got = ", ".join(map(str, shape[1:]))
    with pytest.raises(
        ValueError, match=rf"nn.Linear: expected inputs with 4 features, got shape \[{got}\]"
    ):
        linear(torch.randn(shape).double())
