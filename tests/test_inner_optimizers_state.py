"""The state of an inner optimizer: per parameter, through clones, detached, copied, saved."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.optim.inner import Adam
from tests.batches import batch
from tests.inner_optimizer_cases import OPTIMIZERS, agree, by_batch, found, inner_loop, learner
from tests.models import LR, assert_close

MAML = fastkfo.algorithms.MAML


@pytest.mark.parametrize("name", ["adam", "dampening"])
def test_parameters_without_a_gradient_keep_their_state(name):
    """A parameter that one step's loss does not use is not moved, nor is its momentum."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))

    model, optimizer = Two(), OPTIMIZERS[name]
    kinds = {"adam": torch.optim.Adam, "dampening": torch.optim.SGD}
    theirs, made = Two(), {"adam": {"eps": 1e-3}, "dampening": {"momentum": 0.9, "dampening": 0.3}}
    step = kinds[name](theirs.parameters(), lr=LR, **made[name])
    clone = MAML(model, lr=LR, allow_unused=True, inner_optimizer=optimizer).clone()
    tasks = MAML(model, lr=LR, allow_unused=True, inner_optimizer=optimizer).clone(tasks=1)
    for k in range(4):
        for own in (clone, theirs, tasks):
            loss = own.a.square().sum(-1) + (own.b.pow(3).sum(-1) if k % 2 else 0)
            if own is theirs:
                step.zero_grad()
                loss.backward()
                step.step()
            else:
                own.adapt(loss)
    for p, q in zip(clone.parameters(), theirs.parameters(), strict=True):
        assert_close(p.detach(), q.detach(), tol=1e-12)
    for p, q in zip(tasks.module.parameters(), theirs.parameters(), strict=True):
        assert_close(p.detach()[0], q.detach(), tol=1e-12)


def test_a_clone_goes_on_with_a_copy_of_the_state():
    ours, (x, y) = learner(inner_optimizer=Adam(eps=1e-3)), (z[0] for z in batch("mlp", 1)[:2])

    def adapted(clone, steps):
        for _ in range(steps):
            clone.adapt(F.cross_entropy(clone(x), y))
        return clone

    want = adapted(ours.clone(), 4)
    first = adapted(ours.clone(), 2)
    second = adapted(first.clone(), 2)
    again = adapted(first.clone(), 2)  # `first` is as it was
    tasks = first.clone(tasks=2)
    for _ in range(2):
        loss = fastkfo.per_task(F.cross_entropy)
        tasks.adapt(loss(tasks(torch.stack([x, x])), torch.stack([y, y])))
    params = list(ours.parameters())
    grads = []
    for clone in (want, second, again, tasks.task(1)):
        loss = F.cross_entropy(clone(x), y)
        grads.append(torch.autograd.grad(loss, params, retain_graph=True))
    for other in grads[1:]:
        for a, b in zip(other, grads[0], strict=True):
            assert_close(a, b)


def test_a_detached_clone_has_a_detached_state():
    ours, (x, y) = learner(inner_optimizer=Adam()), (z[0] for z in batch("mlp", 1)[:2])
    clone = ours.clone()
    clone.adapt(F.cross_entropy(clone(x), y))
    pickle.loads(pickle.dumps(clone.inner_optimizer))
    fastkfo.utils.detach_module(clone, keep_requires_grad=True)
    assert not any(b.requires_grad for b in clone._inner_state.flat())
    other = copy.deepcopy(clone)
    for own in (clone, other):
        own.adapt(F.cross_entropy(own(x), y))
    for p, q in zip(clone.parameters(), other.parameters(), strict=True):
        assert_close(p.detach(), q.detach(), tol=1e-12)


def test_copies_and_state_dicts():
    ours, data = learner(steps=3, inner_optimizer=Adam(), clip_grad_value=0.1), batch("mlp", 2)
    assert {"lr.rates.0", "lr.rates.3"} <= set(ours.state_dict())
    assert not any("inner" in key or "diff_sgd" in key for key in ours.state_dict())
    assert [n for n, _ in ours.clone().named_parameters()] == [
        n for n, _ in ours.named_parameters()
    ]
    want = found(ours, by_batch(ours, 3, data))
    fresh = learner(steps=3, inner_optimizer=Adam(), clip_grad_value=0.1)
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(1)
    fresh.load_state_dict(ours.state_dict())
    loop = pickle.loads(pickle.dumps(inner_loop(ours, 3)))
    for other in (copy.deepcopy(ours), fresh, loop.learner):
        agree(found(other, by_batch(other, 3, data)), want, tol=1e-12)
    assert learner().state_dict().keys() == learner(inner_optimizer=Adam()).state_dict().keys()
    assert {p.dtype for p in ours.float().parameters()} == {torch.float32}
