"""`import fastkfo as l2l`: learn2learn's module paths, scripts, and what they do to a clone."""

import copy
import importlib
import inspect
import pickle

import pytest
import torch

import fastkfo
from tests.models import (
    assert_close,
    assert_same,
    learner_of,
    meta_iteration,
    query_loss,
    support_loss,
)
from tests.oracle import learn2learn

l2l = learn2learn()
PATHS = [
    "accuracy",
    "algorithms.BaseLearner",
    "algorithms.GBML",
    "algorithms.MAML",
    "algorithms.MetaSGD",
    "algorithms.base_learner.BaseLearner",
    "algorithms.gbml.GBML",
    "algorithms.maml.MAML",
    "algorithms.maml.maml_update",
    "algorithms.maml_update",
    "algorithms.meta_sgd.MetaSGD",
    "algorithms.meta_sgd.meta_sgd_update",
    "algorithms.meta_sgd_update",
    "clone_distribution",
    "clone_module",
    "clone_named_parameters",
    "clone_parameters",
    "detach_distribution",
    "detach_module",
    "flatten_config",
    "magic_box",
    "nn.Flatten",
    "nn.KroneckerLSTM",
    "nn.KroneckerLinear",
    "nn.KroneckerRNN",
    "nn.Lambda",
    "nn.MetaModule",
    "nn.ParameterTransform",
    "nn.PrototypicalClassifier",
    "nn.Scale",
    "nn.freeze",
    "nn.kroneckers.KroneckerLinear",
    "nn.kroneckers.kronecker_addmm",
    "nn.metalayers.MetaModule",
    "nn.metalayers.ParameterTransform",
    "nn.misc.Scale",
    "nn.unfreeze",
    "optim.DifferentiableSGD",
    "optim.KroneckerTransform",
    "optim.LearnableOptimizer",
    "optim.MetaCurvatureTransform",
    "optim.ModuleTransform",
    "optim.ParameterUpdate",
    "optim.ReshapedTransform",
    "optim.learnable_optimizer.LearnableOptimizer",
    "optim.parameter_update.ParameterUpdate",
    "optim.transforms.KroneckerTransform",
    "optim.transforms.MetaCurvatureTransform",
    "optim.transforms.ModuleTransform",
    "optim.transforms.ReshapedTransform",
    "optim.transforms.TransformDictionary",
    "optim.update_rules.DifferentiableSGD",
    "optim.update_rules.differentiable_sgd.DifferentiableSGD",
    "update_module",
    "utils.clone_module",
    "utils.update_module",
    "warn_once",
]


def lookup(lib, path):
    for name in path.split("."):
        lib = getattr(lib, name)
    return lib


@pytest.mark.parametrize("path", PATHS)
def test_paths_and_signatures(path):
    ours = lookup(fastkfo, path)
    parts = path.split(".")
    if parts[-2:-1]:
        module = importlib.import_module(".".join(["fastkfo", *parts[:-1]]))
        assert getattr(module, parts[-1]) is ours
    try:
        theirs = lookup(l2l, path)
    except AttributeError:
        return  # a path of learn2learn's that only some of its versions have
    if inspect.isclass(theirs):
        for name in ("__init__", "forward", "clone", "adapt", "step"):
            if name in vars(theirs):
                check_signature(getattr(ours, name), getattr(theirs, name))
    elif inspect.isfunction(theirs):
        check_signature(ours, theirs)


def check_signature(ours, theirs):
    """Learn2learn's arguments in its order, with its defaults; ours may have more after them."""
    ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    theirs = [p for p in theirs if p.kind not in kinds]
    for a, b in zip(ours, theirs, strict=False):
        assert (a.name, a.default) == (b.name, b.default)
    assert len(ours) >= len(theirs)


SCRIPT = """
import torch
from torch import nn
import torch.nn.functional as F
import LIBRARY as l2l
from LIBRARY.optim.transforms import KroneckerTransform, MetaCurvatureTransform
from LIBRARY.algorithms.maml import maml_update


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), l2l.nn.Flatten()
        )
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x):
        return self.head(self.features(x))


def main(seed=1):
    torch.manual_seed(seed)
    model = Net()
    learners = {
        "maml": l2l.algorithms.MAML(Net(), lr=0.05),
        "meta-sgd": l2l.algorithms.MetaSGD(Net(), lr=0.05),
        "kfo": l2l.algorithms.GBML(
            model,
            transform=KroneckerTransform(l2l.nn.KroneckerLinear),
            lr=0.05,
            adapt_transform=True,
        ),
        "curvature": l2l.algorithms.GBML(Net(), transform=MetaCurvatureTransform, lr=0.05),
        "hypergradient": l2l.algorithms.GBML(
            Net(), transform=l2l.optim.ModuleTransform(lambda n, m: l2l.nn.Scale(n)), lr=0.05
        ),
    }
    for learner in learners.values():
        learner.to("cpu")
    results = []
    for learner in learners.values():
        opt = torch.optim.Adam(learner.parameters(), lr=0.003)
        for iteration in range(3):
            opt.zero_grad()
            error = 0.0
            for task in range(2):
                task_model = learner.clone()
                x, y = torch.randn(10, 1, 8, 8), torch.arange(10) % 3
                for step in range(2):
                    task_model.adapt(F.cross_entropy(task_model(x[:5]), y[:5]))
                predictions = task_model(x[5:])
                loss = F.cross_entropy(predictions, y[5:])
                loss.backward()
                error += loss.item()
                results.append(l2l.utils.accuracy(predictions, y[5:]).double())
            for p in learner.parameters():
                if p.grad is not None:
                    p.grad.data.mul_(1.0 / 2)
            opt.step()
            results.append(torch.tensor(error))

    net = Net()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    maml_update(net, 0.1, [p.grad for p in net.parameters()])
    clone = l2l.clone_module(net)
    l2l.update_module(clone, [0.5 * p for p in clone.parameters()])
    l2l.detach_module(clone)
    results += [p.detach() for p in clone.parameters()]

    torch.manual_seed(seed)
    linear = nn.Linear(6, 2)
    metaopt = l2l.optim.LearnableOptimizer(linear, l2l.optim.ModuleTransform(nn.Linear), lr=0.01)
    opt = torch.optim.SGD(metaopt.parameters(), lr=0.001)
    for step in range(3):
        metaopt.zero_grad()
        opt.zero_grad()
        loss = linear(torch.randn(4, 6)).square().mean()
        loss.backward()
        opt.step()
        metaopt.step()
        results.append(loss.detach())
    return results


RESULTS = main()
"""


def run(library):
    names = {"__name__": "script"}
    exec(compile(SCRIPT.replace("LIBRARY", library), library, "exec"), names)
    return names["RESULTS"]


def test_a_script_of_learn2learn_s(monkeypatch):
    """The same text with one import changed; in float64, so that Adam's steps agree."""
    monkeypatch.setitem(importlib.sys.modules, "learn2learn", l2l)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        results = [run(library) for library in ("fastkfo", "learn2learn")]
    finally:
        torch.set_default_dtype(before)
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert_close(a.double(), b.double(), floor=1e-3, tol=1e-8, what=f"result {i}")


def test_a_script_in_float32():
    results = run("fastkfo")
    assert all(torch.isfinite(x).all() for x in results)


# --------------------------------------------------------------------------- what a clone may cache


def detach(lib, clone):
    lib.detach_module(clone.module, keep_requires_grad=True)


def detach_all(lib, clone):
    lib.detach_module(clone, keep_requires_grad=True)


def edit(lib, clone):
    with torch.no_grad():
        for factor in clone.compute_update.parameters():
            factor.mul_(1.1)


def exchange(lib, clone):
    linear = clone.compute_update.transforms_modules[0].transform
    linear._parameters["left"] = 2 * linear._parameters["left"]


def other_psd(lib, clone):
    clone.compute_update.transforms_modules[0].transform.psd = False


def assign_data(lib, clone):
    for factor in clone.compute_update.parameters():
        factor.data = 1.1 * factor.data


def freeze(lib, clone):
    lib.detach_module(clone.compute_update)


def other_rate(lib, clone):
    clone.diff_sgd.lr = clone.lr  # learn2learn's clone reads the former, ours the latter


BETWEEN = {
    "nothing": lambda lib, clone: None,
    "backward": lambda lib, clone: query_loss(clone, "mlp").backward(retain_graph=True),
    "backward-freeing": lambda lib, clone: query_loss(clone, "mlp").backward(),
    "detach": detach,
    "detach-all": detach_all,
    "edit": edit,
    "exchange": exchange,
    "data": assign_data,
    "psd": other_psd,
    "freeze": freeze,
    "same-rate": other_rate,
    "evaluate": lambda lib, clone: clone.eval()(torch.zeros(1, 4, dtype=torch.float64)),
}  # fmt: skip


def patterns():
    """What learn2learn allows in between the steps of one clone."""
    return [
        pytest.param(between, first_order, id=f"{between}-{'first' if first_order else 'second'}")
        for between in BETWEEN
        for first_order in (True, False)
        if first_order or between != "backward-freeing"  # second order needs the graph
    ]


@pytest.mark.parametrize(("between", "first_order"), patterns())
@pytest.mark.parametrize("transform", ["kron-psd", "kron-psd-bias", "kron", "mixture"])
def test_between_the_steps_of_a_clone(transform, between, first_order):
    results = []
    for lib in (fastkfo, l2l):
        learner = learner_of(lib, "mlp", transform, first_order=first_order)
        clone = learner.clone()
        for _ in range(3):
            clone.adapt(support_loss(clone, "mlp"))
            BETWEEN[between](lib, clone)
            if between == "backward-freeing":
                detach(lib, clone)
        last = [p for p in clone.compute_update.parameters() if p.requires_grad and p.is_leaf]
        clone.adapt(support_loss(clone, "mlp"))
        loss = query_loss(clone, "mlp")
        results.append([loss, *clone.module.parameters()])
        # Factors edited or detached in place break earlier steps' backward, in learn2learn too.
        if between not in ("edit", "data", "freeze"):
            if loss.requires_grad:
                loss.backward()
            results[-1] += [p.grad for p in [*learner.parameters(), *last]]
    for a, b in zip(*results, strict=True):
        assert_close(a, b, floor=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("transform", ["kron-psd", "mixture"])
def test_copies_of_an_adapted_clone(transform, steps):
    learner = learner_of(fastkfo, "mlp", transform)
    clone = learner.clone()
    for _ in range(steps):
        clone.adapt(support_loss(clone, "mlp"))
    fastkfo.detach_module(clone, keep_requires_grad=True)
    clone.transform = None  # which may be a function
    for other in (copy.deepcopy(clone), pickle.loads(pickle.dumps(clone)), clone.clone()):
        saved = [p.clone() for p in clone.parameters()]
        for _ in range(2):
            other.adapt(support_loss(other, "mlp"))
        query_loss(other, "mlp").backward()
        assert all(torch.equal(p, q) for p, q in zip(saved, clone.parameters(), strict=True))
    fresh = clone.clone()
    for _ in range(2):
        fresh.adapt(support_loss(fresh, "mlp"))
    for a, b in zip(fresh.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_copies_of_a_learner_train_alone():
    learner = learner_of(fastkfo, "cnn", "kron-psd")
    learner.transform = None
    saved = [p.clone() for p in learner.parameters()]
    want = meta_iteration(copy.deepcopy(learner), "cnn")
    for other in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        assert_same(meta_iteration(other, "cnn"), want)
        torch.optim.SGD(other.parameters(), 1.0).step()
        assert all(p.grad is None for p in learner.parameters())
        assert all(torch.equal(p, q) for p, q in zip(saved, learner.parameters(), strict=True))


def test_another_dtype_after_construction():
    learner = learner_of(fastkfo, "mlp", "mixture").float()
    clone = learner.clone()
    clone.adapt(clone(torch.ones(2, 4)).square().sum())
    fastkfo.detach_module(clone, keep_requires_grad=True)
    clone.double()
    for _ in range(2):
        clone.adapt(clone(torch.ones(2, 4, dtype=torch.float64)).square().sum())
    assert {p.dtype for p in clone.parameters()} == {torch.float64}


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
def test_adapt_under_no_grad(first_order):
    results = []
    for lib in (fastkfo, l2l):
        clone = learner_of(lib, "mlp", "kron-psd", first_order=first_order).clone()
        for _ in range(2):
            loss = support_loss(clone, "mlp")
            with torch.no_grad():
                clone.adapt(loss)
            lib.detach_module(clone.module)
            clone.module.requires_grad_()
            clone.adapt(support_loss(clone, "mlp"))
        results.append(list(clone.module.parameters()))
    for a, b in zip(*results, strict=True):
        assert_close(a, b)
