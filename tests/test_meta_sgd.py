"""MetaSGD and meta_sgd_update equal learn2learn's, in float64."""

import copy
import pickle

import pytest
import torch

import fastkfo
from fastkfo.algorithms import MetaSGD, meta_sgd_update
from tests.models import (
    LR,
    assert_close,
    assert_same,
    build,
    meta_iteration,
    perturb,
    snapshot,
    support_loss,
    task,
)
from tests.oracle import learn2learn

l2l = learn2learn()
ORDERS = pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])


def learner_of(lib, name, **options):
    return perturb(lib.algorithms.MetaSGD(build(name), lr=LR, **options), 0.02)


@ORDERS
@pytest.mark.parametrize("where", ["init", "adapt"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "gru", "conv1d", "conv3d", "scalar"])
def test_equals_learn2learn(name, where, first_order):
    options = {"first_order": first_order if where == "init" else not first_order}
    adapt = {} if where == "init" else {"first_order": first_order}
    runs = [meta_iteration(learner_of(lib, name, **options), name, adapt=adapt)
            for lib in (fastkfo, l2l)]  # fmt: skip
    assert_same(*runs)


def test_tied_weights_stay_tied():
    clone = learner_of(fastkfo, "tied").clone()
    weight, rate = clone.module.first.weight, clone.lrs[0]
    loss = support_loss(clone, "tied")
    (grad,) = torch.autograd.grad(loss, [weight], retain_graph=True)
    clone.adapt(loss)
    assert clone.module.first.weight is clone.module.second.weight  # two tensors in learn2learn
    assert_close(clone.module.first.weight, weight - rate * grad, tol=1e-14)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_state_dicts_load_both_ways(name):
    ours, theirs = learner_of(fastkfo, name), learner_of(l2l, name)
    for source, target in ((ours, theirs), (theirs, ours)):
        assert list(source.state_dict()) == list(target.state_dict())
        target.load_state_dict(source.state_dict(), strict=True)
    assert list(ours.clone().state_dict()) == list(theirs.clone().state_dict())
    assert isinstance(ours.clone().lrs, list)


def test_rates_of_one_s_own():
    model = build("mlp")
    rates = [torch.full_like(p, 0.1 * (i + 1)) for i, p in enumerate(model.parameters())]
    runs = [
        meta_iteration(lib.algorithms.MetaSGD(build("mlp"), lrs=rates), "mlp")
        for lib in (fastkfo, l2l)
    ]
    assert_same(*runs)


@pytest.mark.parametrize("defaults", [False, True], ids=["given", "stored"])
def test_meta_sgd_update(defaults):
    results = []
    for lib in (fastkfo, l2l):
        model = lib.utils.clone_module(build("cnn"))
        params = list(model.parameters())
        grads = torch.autograd.grad(support_loss(model, "cnn"), params)
        rates = [torch.full_like(p, 0.1) for p in params]
        if defaults:
            for p, rate, grad in zip(params, rates, grads, strict=True):
                p.grad, p._lr = grad, rate
            updated = lib.algorithms.meta_sgd.meta_sgd_update(model)
        else:
            updated = lib.algorithms.meta_sgd.meta_sgd_update(model, rates, grads)
        assert updated is model
        results.append(list(model.parameters()))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, floor=1e-3)


def test_copies_train_alone():
    learner = learner_of(fastkfo, "mlp")
    saved = [p.clone() for p in learner.parameters()]
    for other in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        meta_iteration(other, "mlp")
        torch.optim.SGD(other.parameters(), 1.0).step()
        pairs = zip(saved, learner.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert all(p.grad is None for p in learner.parameters())


def test_another_dtype():
    learner = learner_of(fastkfo, "mlp").float()
    clone = learner.clone()
    x, y, _, _ = task("mlp")
    clone.adapt(torch.nn.functional.cross_entropy(clone(x.float()), y))
    assert {p.dtype for p in clone.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda m: None, TypeError, "loss: expected a tensor, got NoneType"),
        (lambda m: m(task("mlp")[0]), ValueError, r"loss: expected one number, got shape \[6, 3\]"),
        (lambda m: torch.tensor(1.0), ValueError, "loss: expected a tensor with a graph"),
    ],
    ids=["none", "matrix", "no-graph"],
)
@ORDERS
def test_bad_losses_leave_the_learner_alone(bad, error, message, first_order):
    learner = learner_of(fastkfo, "mlp", first_order=first_order).clone()
    before = snapshot(learner)
    with pytest.raises(error, match=message):
        learner.adapt(bad(learner))
    assert snapshot(learner)[:2] == before[:2]
    learner.adapt(support_loss(learner, "mlp"))


@pytest.mark.parametrize(("name", "hint"), [("unused", "used"), ("frozen", "require grad")])
def test_unused_and_frozen_parameters_are_errors(name, hint):
    learner = learner_of(fastkfo, name).clone()
    before = snapshot(learner)
    with pytest.raises(RuntimeError, match=hint):
        learner.adapt(support_loss(learner, name))
    assert snapshot(learner)[:2] == before[:2]


def test_bad_arguments():
    model = build("mlp")
    params = list(model.parameters())
    with pytest.raises(ValueError, match="lrs: expected 4, one per parameter, got 3"):
        MetaSGD(model, lrs=params[:3])
    with pytest.raises(ValueError, match="lr: expected a finite number, got inf"):
        MetaSGD(model, lr=float("inf"))
    with pytest.raises(TypeError, match="got a compiled"):
        MetaSGD(torch.compile(model))
    ones = [torch.ones_like(p) for p in params]
    before = snapshot(model)
    with pytest.raises(ValueError, match="grads: expected 4, one per parameter, got 3"):
        meta_sgd_update(model, ones, ones[:3])
    with pytest.raises(ValueError, match="lrs: expected 4, one per parameter, got 5"):
        meta_sgd_update(model, [*ones, ones[0]], ones)
    with pytest.raises(ValueError, match="lrs: expected a tensor for parameter 0, got None"):
        meta_sgd_update(model, None, ones)
    with pytest.raises(ValueError, match=r"lr for parameter 0: expected .* \[7, 4\], got \[4, 7\]"):
        meta_sgd_update(model, [ones[0].T, *ones[1:]], ones)
    assert snapshot(model)[:2] == before[:2]
    meta_sgd_update(model, ones, ones)
