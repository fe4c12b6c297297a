"""MAML and maml_update equal learn2learn's, in float64."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.algorithms import MAML, maml_update
from tests.models import (
    LR,
    assert_close,
    assert_same,
    build,
    meta_iteration,
    query_loss,
    snapshot,
    support_loss,
    task,
)
from tests.oracle import learn2learn

l2l = learn2learn()
ORDERS = pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])


def both(name, clone=None, adapt=None, **options):
    return [
        meta_iteration(lib.algorithms.MAML(build(name), LR, **options), name, 3, clone, adapt)
        for lib in (fastkfo, l2l)
    ]


@ORDERS
@pytest.mark.parametrize(
    "name", ["mlp", "cnn", "lstm", "gru", "tied", "conv1d", "conv3d", "scalar"]
)
def test_equals_learn2learn(name, first_order):
    assert_same(*both(name, first_order=first_order))


@ORDERS
@pytest.mark.parametrize("where", ["init", "clone", "adapt"])
@pytest.mark.parametrize(
    ("name", "allow"),
    [
        ("unused", {"allow_unused": True}),
        ("frozen", {"allow_nograd": True}),
        ("unused", {"allow_nograd": True, "allow_unused": True}),
    ],
    ids=["unused", "frozen", "unused-nograd"],
)
def test_unused_and_frozen(name, allow, where, first_order):
    options = allow if where == "init" else {}
    calls = {where: allow} if where != "init" else {}
    assert_same(*both(name, first_order=first_order, **options, **calls))


def test_allow_unused_follows_allow_nograd():
    for allow in (False, True):
        assert MAML(build("mlp"), LR, allow_nograd=allow).allow_unused is allow
    assert MAML(build("mlp"), LR, allow_nograd=True, allow_unused=False).allow_unused is False


@pytest.mark.parametrize("given", ["clone", "adapt"])
@ORDERS
def test_options_of_a_call_override_the_learner_s(first_order, given):
    got, want = both("mlp", first_order=not first_order, **{given: {"first_order": first_order}})
    assert_same(got, want)
    assert_same(got, both("mlp", first_order=first_order)[1])


@pytest.mark.parametrize("kind", ["tensor", "parameter"])
def test_a_learned_rate(kind):
    def learner(value):
        rate = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        return MAML(build("mlp"), nn.Parameter(rate.detach()) if kind == "parameter" else rate)

    learned = learner(LR)
    meta_iteration(learned, "mlp")
    eps = 1e-5
    up, down = (sum(meta_iteration(learner(LR + e), "mlp").losses) for e in (eps, -eps))
    assert_close(learned.lr.grad, (up - down) / (2 * eps), tol=1e-6)
    assert [k for k in learned.state_dict() if k == "lr"] == ["lr"] * (kind == "parameter")


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_state_dicts_load_both_ways(name):
    ours, theirs = (lib.algorithms.MAML(build(name), LR) for lib in (fastkfo, l2l))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for source, target in ((ours, theirs), (theirs, ours)):
        for saved in (source, source.clone()):
            target.load_state_dict(saved.state_dict(), strict=True)


def test_attributes_of_the_model_are_the_learner_s():
    model = build("tied")
    learner = MAML(model, LR)
    assert learner.head is model.head
    assert learner.clone().head is not model.head
    with pytest.raises(AttributeError, match="nowhere"):
        _ = learner.nowhere


def test_running_statistics_in_a_clone_move_the_learner_s():
    learners = [lib.algorithms.MAML(build("cnn"), LR) for lib in (fastkfo, l2l)]
    for learner in learners:
        before = learner.module[1].running_mean.clone()
        clone = learner.clone()
        clone.adapt(support_loss(clone, "cnn"))
        assert clone.module[1].running_mean is learner.module[1].running_mean
        assert not torch.equal(before, learner.module[1].running_mean)
    pairs = zip(*(learner.buffers() for learner in learners), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_copies_train_alone():
    learner = MAML(build("cnn"), LR)
    saved = [p.clone() for p in learner.parameters()]
    for other in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        meta_iteration(other, "cnn")
        torch.optim.SGD(other.parameters(), 1.0).step()
        assert all(p.grad is None for p in learner.parameters())
        pairs = zip(saved, learner.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert not torch.equal(saved[0], next(other.parameters()))


# -------------------------------------------------------------------------------------- maml_update


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied", "lstm"])
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_maml_update(name, some):
    params, grads = [], []
    for lib in (fastkfo, l2l):
        model = lib.utils.clone_module(source := build(name))
        found = list(torch.autograd.grad(
            support_loss(model, name), list(model.parameters()), create_graph=True
        ))  # fmt: skip
        if some:
            found[1] = None
        updated = lib.algorithms.maml.maml_update(model, LR, found)
        assert updated is model
        params.append(list(model.parameters()))
        query_loss(model, name).backward()
        grads.append([p.grad for p in source.parameters()])
    total = sum(g.norm() ** 2 for g in grads[1]) ** 0.5
    for a, b in zip(*params, strict=True):
        assert_close(a, b, floor=1e-3)
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, floor=1e-4 * total)


def test_maml_update_reads_the_parameters_own_gradients():
    model = build("mlp")
    with pytest.raises(ValueError, match=r"grads: expected a list, or parameters with a \.grad"):
        maml_update(model, LR)  # a silent no-op in learn2learn
    support_loss(model, "mlp").backward()
    want = [p - LR * p.grad for p in model.parameters()]
    maml_update(model, LR)
    for a, b in zip(model.parameters(), want, strict=True):
        assert_close(a, b, tol=1e-14)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("lr", "error", "message"),
    [
        (float("nan"), ValueError, "lr: expected a finite number, got nan"),
        (float("-inf"), ValueError, "lr: expected a finite number, got -inf"),
        ("0.1", TypeError, "lr: expected .* got str"),
        (None, TypeError, "lr: expected .* got NoneType"),
        (torch.tensor(1), TypeError, r"lr: expected .* got torch\.int64"),
    ],
    ids=["nan", "inf", "str", "none", "integers"],
)
def test_bad_rates(lr, error, message):
    with pytest.raises(error, match=message):
        MAML(build("mlp"), lr)
    with pytest.raises(error, match=message):
        maml_update(build("mlp"), lr, [None] * 4)


@pytest.mark.parametrize("how", ["function", "method", "inside"])
def test_compiled_models(how):
    model = build("mlp")
    if how == "method":
        model.compile()
    elif how == "inside":
        model[0].compile()
    else:
        model = torch.compile(model)
    with pytest.raises(
        TypeError, match="model: expected a module of plain PyTorch, got a compiled"
    ):
        MAML(model, LR)


def test_a_model_compiled_later_is_refused_by_clone():
    learner = MAML(build("mlp"), LR)
    learner.module.compile()
    with pytest.raises(TypeError, match="got a compiled Sequential"):
        learner.clone()
    learner.module._compiled_call_impl = None
    meta_iteration(learner, "mlp")


def test_no_module():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        MAML([], LR)


BAD_LOSSES = {
    "number": (lambda m: 0.5, TypeError, "loss: expected a tensor, got float"),
    "vector": (lambda m: m(task("frozen")[0])[:, 0], ValueError, r"loss: expected one .* \[6\]"),
    "detached": (lambda m: m(task("frozen")[0]).sum().detach(), ValueError, "loss: .* graph"),
    "frozen": (lambda m: support_loss(m, "frozen"), RuntimeError, "allow_nograd=True"),
}


@pytest.mark.parametrize(("bad", "error", "message"), BAD_LOSSES.values(), ids=BAD_LOSSES)
@ORDERS
def test_bad_losses_leave_the_learner_alone(bad, error, message, first_order):
    learner = MAML(build("frozen"), LR, first_order=first_order).clone()
    before = snapshot(learner)
    with pytest.raises(error, match=message):
        learner.adapt(bad(learner))
    assert snapshot(learner)[:2] == before[:2]
    learner.adapt(support_loss(learner, "frozen"), allow_nograd=True)
    assert snapshot(learner)[0] != before[0]


def test_an_unused_parameter_without_the_option():
    learner = MAML(build("unused"), LR).clone()
    before = snapshot(learner)
    with pytest.raises(RuntimeError, match="allow_unused=True"):
        learner.adapt(support_loss(learner, "unused"))
    assert snapshot(learner)[:2] == before[:2]
    learner.adapt(support_loss(learner, "unused"), allow_unused=True)


BAD_GRADS = {
    "short": (lambda g: g[:-1], ValueError, "expected 4, one per parameter, got 3"),
    "long": (lambda g: [*g, g[0]], ValueError, "expected 4, one per parameter, got 5"),
    "shape": (lambda g: [g[0].T, *g[1:]], ValueError, r"shape \[7, 4\], got \[4, 7\]"),
    "dtype": (lambda g: [g[0], g[1].float(), *g[2:]], TypeError, r"got torch\.float32"),
    "device": (lambda g: [g[0].to("meta"), *g[1:]], ValueError, "device cpu, got meta"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_GRADS.values(), ids=BAD_GRADS)
@pytest.mark.parametrize("call", ["maml_update", "sgd"])
def test_bad_gradients_leave_the_module_alone(call, change, error, message):
    model = build("mlp")
    grads = torch.autograd.grad(support_loss(model, "mlp"), list(model.parameters()))
    update = fastkfo.optim.DifferentiableSGD(LR)
    before = snapshot(model)
    step = update if call == "sgd" else lambda model, bad: maml_update(model, LR, bad)
    with pytest.raises(error, match=message):
        step(model, change(list(grads)))
    assert snapshot(model)[:2] == before[:2]
    x, y, _, _ = task("mlp")
    assert update(model, grads) is None  # it changes the module
    F.cross_entropy(model(x), y).backward()
