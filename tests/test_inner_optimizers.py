"""Inner optimizers, clipping and rates per step: what they compose with, and bad input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.optim.inner import SGD, Adam, InnerOptimizer, RMSProp
from tests.batches import NEEDS, batch
from tests.inner_optimizer_cases import (
    CLIPS,
    OPTIMIZERS,
    PATHS,
    agree,
    by_batch,
    by_loop,
    found,
    inner_loop,
    learner,
)
from tests.models import LR, Squash, assert_close, build, perturb
from tests.test_inner_loop import features

MAML, GBML = fastkfo.algorithms.MAML, fastkfo.algorithms.GBML
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
KEPT = torch.tensor([0, 2])


def spoiled(name="mlp", bad=float("nan")):
    data = [x.clone() for x in batch(name, 3)]
    data[0][1, 2].view(-1)[0] = bad
    return data


def test_plain_sgd_is_none():
    ours, plain = learner(inner_optimizer=SGD()), learner()
    data = batch("mlp", 3)
    for run in (by_loop, by_batch, lambda *x: inner_loop(x[0], 3)(*data).loss):
        got, want = found(ours, run(ours, 3, data)), found(plain, run(plain, 3, data))
        assert torch.equal(got.losses, want.losses)
        assert all(torch.equal(g, want.grads[n]) for n, g in got.grads.items())
    assert inner_loop(ours, 3).why_not_fused() == inner_loop(plain, 3).why_not_fused()


@pytest.mark.parametrize("path", ["full", "checkpoint", "adjoint", "chunks"])
@pytest.mark.parametrize("adapt", [False, True], ids=["fixed", "adapted"])
@pytest.mark.parametrize("name", [*OPTIMIZERS, None])
def test_a_bad_task_stays_alone(name, adapt, path):
    clip = CLIPS["norm" if name in ("adam", "nesterov") else "none"]
    ours = learner(
        steps=3, shared=True, adapt_transform=adapt, inner_optimizer=OPTIMIZERS.get(name), **clip
    )
    good = [x[KEPT] for x in batch("mlp", 3)]
    want = found(ours, inner_loop(ours, 3, **PATHS[path])(*good).loss)
    out = inner_loop(ours, 3, **PATHS[path])(*spoiled())
    assert out.finite.tolist() == [True, False, True]
    for losses in (out.loss[out.finite], out.loss):
        got = torch.autograd.grad(losses.sum(), list(ours.parameters()), retain_graph=True)
        for g, (what, w) in zip(got, want.grads.items(), strict=True):
            assert_close(g, w, what=what)


def test_a_bad_task_of_a_batched_learner():
    ours = learner("cnn", inner_optimizer=Adam(eps=1e-3))
    want = found(ours, by_batch(ours, 2, [x[KEPT] for x in batch("cnn", 3)]))
    losses = by_batch(ours, 2, spoiled("cnn"))
    assert losses.isfinite().tolist() == [True, False, True]
    agree(found(ours, losses[KEPT]), want)


@every_path
def test_bitwise_the_same_again(path):
    ours, data = learner("cnn", inner_optimizer=Adam(), clip_grad_norm=1.0), batch("cnn", 3)
    runs = [found(ours, inner_loop(ours, 3, **path)(*data).loss) for _ in range(2)]
    assert torch.equal(runs[0].losses, runs[1].losses)
    for a, b in zip(runs[0].grads.values(), runs[1].grads.values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", [Adam(), RMSProp(momentum=0.5)], ids=["adam", "rmsprop"])
@every_path
def test_a_unit_that_is_dead(path, optimizer):
    """Its gradients are 0, where a root's derivative is infinite; and the norm of all is 0."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = -1
    ours = GBML(model, lambda p: None, lr=LR, inner_optimizer=optimizer, clip_grad_norm=1.0)
    data = [x.clone() for x in batch("mlp", 3)]
    got = found(ours, inner_loop(ours, 3, **path)(*data).loss)
    assert all(g.isfinite().all() for g in got.grads.values())
    assert not got.grads["module.0.weight"][1].any()
    assert got.grads["module.0.weight"][0].any()


@pytest.mark.parametrize("optimizer", [Adam(eps=0.1), RMSProp(eps=0.1)], ids=["adam", "rmsprop"])
def test_the_derivative_at_a_gradient_of_zero_is_exact(optimizer):
    """1/ε: that of u / (c |u| + ε)."""
    for u in (0.0, 1e-12):
        x = torch.tensor(u, dtype=torch.float64, requires_grad=True)
        d, _ = optimizer.direction(x, (), 0)
        (slope,) = torch.autograd.grad(d, x)
        assert slope.item() == pytest.approx(10, rel=1e-9)


def test_gradients_of_zero_are_not_clipped():
    model = nn.Linear(4, 3).double()
    clone = MAML(model, lr=LR, clip_grad_norm=1.0).clone()
    x = torch.zeros(2, 4, dtype=torch.float64)
    clone.adapt((clone(x) * 0).sum())
    (g,) = torch.autograd.grad(clone.module.weight.sum(), model.weight)
    assert torch.equal(g, torch.ones_like(g))


@every_path
def test_features_and_tasks_of_unlike_shapes(path):
    body, data = features(), batch("cnn", 3)
    head = nn.Linear(body(data[0][0]).shape[1], 3).double()
    ours = MAML(head, LR, inner_optimizer=Adam(eps=1e-3))
    wanted = [*ours.parameters(), *body.parameters()]
    both = [
        fastkfo.InnerLoop(ours, F.cross_entropy, 3, features=body.eval(), **options)
        for options in (path, {"backend": "loop"})
    ]
    lists = [[x[0], x[1, :5], x[2]] for x in data]
    grads = [torch.autograd.grad(loop(*lists).loss.sum(), wanted) for loop in both]
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("adapt", [False, True], ids=["fixed", "adapted"])
@pytest.mark.parametrize("name", ["tied", "unused", "frozen", "conv1d", "scalar"])
def test_models(name, adapt):
    options = NEEDS.get(name, {}) | {"adapt_transform": adapt, "clip_grad_norm": 0.7}
    ours, data = learner(name, inner_optimizer=Adam(eps=1e-2), **options), batch(name, 2)
    want = found(ours, by_loop(ours, 3, data))
    for path in PATHS.values():
        agree(found(ours, inner_loop(ours, 3, **path)(*data).loss), want)


def test_a_model_that_cannot_be_batched():
    ours, data = learner("lstm", steps=3, inner_optimizer=RMSProp(eps=1e-2)), batch("lstm", 2)
    want = found(ours, by_loop(ours, 3, data))
    for memory in ("full", "checkpoint", "adjoint"):
        loop = inner_loop(ours, 3, memory=memory)
        with pytest.warns(UserWarning, match="cannot be batched"):
            agree(found(ours, loop(*data).loss), want)


def test_a_transform_and_an_update_of_a_users_own():
    data = batch("mlp", 2)
    own = GBML(build("mlp"), Squash, lr=LR, inner_optimizer=Adam(eps=1e-3), clip_grad_norm=0.5)
    perturb(own.double())
    want = found(own, by_loop(own, 3, data))
    for path in PATHS.values():
        agree(found(own, inner_loop(own, 3, **path)(*data).loss), want)

    class Update(fastkfo.optim.ParameterUpdate):
        pass

    update = Update(own.module.parameters(), Squash)
    other = GBML(own.module, None, lr=LR, inner_optimizer=Adam(eps=1e-3), compute_update=update)
    other.double().load_state_dict(own.state_dict())
    plain = GBML(own.module, Squash, lr=LR, inner_optimizer=Adam(eps=1e-3)).double()
    plain.load_state_dict(own.state_dict())
    want = found(plain, by_loop(plain, 3, data))
    got = found(other, by_loop(other, 3, data))
    agree(got, want)


class Sign(InnerOptimizer):
    """A user's own."""

    def direction(self, update, buffers, count):
        return update.sign(), ()


def test_an_optimizer_of_a_users_own():
    ours, data = learner(inner_optimizer=Sign()), batch("mlp", 2)
    agree(found(ours, by_batch(ours, 2, data)), found(ours, by_loop(ours, 2, data)))
