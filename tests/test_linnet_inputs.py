"""What LinNet, and what makes and collapses it, refuses."""

import pytest
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.algorithms import MAML
from fastkfo.nn import LinNet, add_linear_layers, collapse, collapse_layers, split_linear
from tests.oracle import learn2learn
from tests.test_linnet import assert_same_function, learners, mlp


class Odd(nn.Linear):
    """Somebody's own linear layer."""


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def hooked():
    model = mlp()
    model[2].register_forward_hook(lambda *_: None)
    return model


class Doubled(LinNet):
    """A LinNet that is more than its layers."""

    def forward(self, x):
        return 2 * super().forward(x)


class Tall(LinNet):
    """A LinNet made in another way."""

    def __init__(self):
        super().__init__(7, 6)


def test_a_subclass_that_is_its_layers_collapses():
    deep = Tall().double()
    assert_same_function(collapse(nn.Sequential(deep)), deep)


def with_hook(register, part=lambda model: model[2]):
    model = split_linear(mlp(), "2", 2)
    getattr(part(model), register)(lambda *_: None)
    return model


def with_forward():
    model = split_linear(mlp(), "2", 2)
    model[2].forward = lambda x: x
    return model


def with_hooked_nest(nest):
    nest.register_forward_hook(lambda *_: None)
    return LinNet(2, 2).append(nest)


def learner(kind=0, **options):
    return list(learners(split_linear(mlp(), "2", 2)))[kind].clone(**options)


def inner_loop(kind=0):
    return fastkfo.InnerLoop(list(learners(split_linear(mlp(), "2", 2)))[kind], F.cross_entropy, 1)


def lazy():
    return nn.Sequential(nn.LazyLinear(3), LinNet(2, 3))


def meta_sgd():
    return nn.Sequential(fastkfo.algorithms.MetaSGD(split_linear(mlp(), "2", 2), lr=0.1))


CASES = {
    "a learner within": (
        lambda: collapse(nn.Sequential(learner())), TypeError,
        "model: .*the MAML itself, at '0',.* pass its `module`",
    ),
    "KFO within": (lambda: collapse(nn.ModuleList([learner(1)])), TypeError, "the GBML itself"),
    "MetaSGD within": (lambda: collapse(meta_sgd()), TypeError, "MetaSGD itself, at '0'"),
    "a loop": (lambda: collapse(inner_loop()), TypeError, "InnerLoop.* its `learner.module`"),
    "added to a loop": (lambda: add_linear_layers(inner_loop(1), 1), TypeError, "the InnerLoop"),
    "split in a loop": (
        lambda: split_linear(inner_loop(), "learner.module.0", 2), TypeError, "the InnerLoop"
    ),
    "several tasks": (
        lambda: collapse(learner(tasks=2)), TypeError,
        "BatchedLearner itself.* the `module` of a clone without `tasks`",
    ),
    "several tasks' layers": (
        lambda: collapse_layers([learner(tasks=2).module[0]]), ValueError,
        r"expected a weight \[n, m\], got one of shape \[2, 8, 6\]",
    ),
    "learn2learn's learner": (
        lambda: collapse(nn.Sequential(learn2learn().algorithms.MAML(LinNet(2, 2), lr=0.1))),
        TypeError, "the MAML itself, at '0'",
    ),
    "a hook": (
        lambda: collapse(with_hook("register_forward_hook")), TypeError,
        "model: at '2': expected an nn.Sequential without hooks, got a LinNet with hooks",
    ),
    "a pre-hook": (
        lambda: collapse(with_hook("register_forward_pre_hook")), TypeError, "LinNet with hooks"
    ),
    "a backward hook": (
        lambda: collapse(with_hook("register_full_backward_hook")), TypeError, "LinNet with hooks"
    ),
    "a factor's hook": (
        lambda: collapse(with_hook("register_forward_hook", lambda model: model[2][1])),
        TypeError, "an nn.Linear without hooks, got a Linear with hooks",
    ),
    "a forward": (lambda: collapse(with_forward()), TypeError, "a LinNet with a forward of its"),
    "a subclass's forward": (
        lambda: collapse(Doubled(2, 2)), TypeError, "got a Doubled with a forward of its own"
    ),
    "a hook in a nest": (
        lambda: collapse(with_hooked_nest(nn.Sequential(nn.Linear(2, 2)))), TypeError,
        "got a Sequential with hooks",
    ),
    "an identity's hook": (
        lambda: collapse(with_hooked_nest(nn.Identity())), TypeError, "got a Identity with hooks"
    ),
    "lazy": (lambda: collapse(lazy()), ValueError, "model: .* lazy LazyLinear at '0'"),
    "added to lazy": (lambda: add_linear_layers(lazy(), 1), ValueError, "call the model once"),
    "meta": (lambda: collapse(LinNet(2, 3, device="meta")), ValueError, "on the meta device"),
    "an int": (lambda: collapse_layers(3), TypeError, "layers: .* expected an nn.Linear, got int"),
    "None": (lambda: collapse_layers(None), TypeError, "layers: .* an nn.Linear, got NoneType"),
    "a str": (lambda: collapse_layers("ab"), TypeError, "layers: .* an nn.Linear, got str"),
    "added at 0": (
        lambda: add_linear_layers(mlp(), 1, name=0), TypeError, "name: expected a str, got int"
    ),
    "no module": (lambda: split_linear(3, "0", 2), TypeError, "model: expected a torch.nn.Module"),
    "a learner": (
        lambda: collapse(MAML(mlp(), lr=0.1)), TypeError, "MAML itself.*pass its `module`"
    ),
    "no such layer": (lambda: split_linear(mlp(), "7", 2), ValueError, "name: expected a layer"),
    "no name": (lambda: split_linear(mlp(), 0, 2), TypeError, "name: expected a str, got int"),
    "not linear": (
        lambda: split_linear(mlp(), "1", 2), TypeError, "'1': expected an nn.Linear, got ReLU"
    ),
    "a subclass": (
        lambda: split_linear(nn.Sequential(Odd(2, 2)), "0", 2), TypeError, "nn.Linear, got Odd"
    ),
    "hooks": (lambda: add_linear_layers(hooked(), 2), TypeError, "without hooks"),
    "weight norm": (
        lambda: split_linear(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "", 2),
        TypeError, "expected an nn.Linear, got ParametrizedLinear",
    ),
    "tied": (lambda: split_linear(tied(), "0", 2), ValueError, "shares no weight, got '0'"),
    "nothing to add to": (
        lambda: add_linear_layers(nn.Sequential(nn.ReLU()), 2), ValueError, "model: expected at"
    ),
    "added at": (lambda: add_linear_layers(mlp(), 2, "1"), TypeError, "nn.Linear, got ReLU"),
    "added 0": (lambda: add_linear_layers(mlp(), 0), ValueError, "depth: expected at least 1, got"),
    "depth 0": (lambda: split_linear(mlp(), "0", 0), ValueError, "depth: expected at least 1, got"),
    "depth 1.5": (lambda: LinNet(1.5, 2), TypeError, "depth: expected an int, got float"),
    "depth True": (lambda: LinNet(True, 2), TypeError, "depth: expected an int, got bool"),
    "features": (lambda: LinNet(2, 0), ValueError, "in_features: expected at least 1, got 0"),
    "outputs": (lambda: LinNet(2, 1, -1), ValueError, "out_features: expected at least 1, got -1"),
    "width": (lambda: split_linear(mlp(), "0", 2, width=0), ValueError, "width: expected at least"),
    "too narrow": (
        lambda: split_linear(mlp(), "0", 2, width=5), ValueError, "width: expected at least 6"
    ),
    "init": (lambda: LinNet(2, 2, init="x"), ValueError, "init: expected one of default, identity"),
    "split init": (lambda: split_linear(mlp(), "0", 2, init=1), ValueError, "init: expected one"),
    "nothing to collapse": (lambda: collapse(mlp()), ValueError, "at least one LinNet, got none"),
    "a non-linearity": (
        lambda: collapse_layers(mlp()), TypeError, "at linear layer 1: expected an nn.Linear, got R"
    ),
    "put in later": (
        lambda: collapse(nn.Sequential(LinNet(2, 2).append(nn.Dropout()))), TypeError, "got Dropout"
    ),
    "sizes": (
        lambda: collapse_layers([nn.Linear(2, 3), nn.Identity(), nn.Linear(2, 2)]), ValueError,
        "linear layer 1 to take the 3 features that come in",
    ),
    "no layers": (lambda: collapse_layers([nn.Identity()]), ValueError, "at least one nn.Linear"),
    "no layer": (lambda: collapse_layers([None]), TypeError, "expected an nn.Linear, got NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_errors(name):
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call()
