"""Inner optimizers in every memory mode: one meta-gradient, and no graph that grows with K."""

import itertools

import pytest
import torch

from fastkfo.inner_loop import memory
from tests.batches import batch
from tests.inner_optimizer_cases import (
    CLIPS,
    OPTIMIZERS,
    PATHS,
    agree,
    by_loop,
    found,
    inner_loop,
    learner,
)
from tests.models import assert_close

VARIANTS = {
    "maml": {"kind": "maml"},
    "kfo": {},
    "kfo-adapt": {"adapt_transform": True},
    "first": {"first_order": True},
    "first-adapt": {"first_order": True, "adapt_transform": True},
}


def dealt(*axes):
    """Every value of the first two axes together; the others' in turn."""
    pairs = list(itertools.product(*axes[:2]))
    others = [itertools.cycle(axis) for axis in axes[2:]]
    return [(*pair, *[next(other) for other in others]) for pair in pairs]


@pytest.mark.parametrize(
    ("name", "variant", "clip", "steps"),
    dealt([*OPTIMIZERS, None], VARIANTS, CLIPS, (1, 3, 5, 3)),
)
def test_every_mode(name, variant, clip, steps):
    if VARIANTS[variant].get("first_order"):
        steps = max(steps, 2)
    rates = {"steps": steps, "shared": "adapt" in variant}
    options = VARIANTS[variant] | CLIPS[clip] | {"inner_optimizer": OPTIMIZERS.get(name)} | rates
    ours, data = learner(**options), batch("mlp", 3)
    want = found(ours, by_loop(ours, steps, data))
    for path in PATHS.values():
        agree(found(ours, inner_loop(ours, steps, **path)(*data).loss), want)


@pytest.mark.parametrize("name", ["adam", "rmsprop-momentum", "dampening"])
@pytest.mark.parametrize("variant", ["maml", "kfo-adapt"])
def test_a_convolutional_model_with_weighted_steps(name, variant):
    ours = learner("cnn", inner_optimizer=OPTIMIZERS[name], **VARIANTS[variant])
    data, weights = batch("cnn", 3), [0.3, 0.0, 1.0]
    losses = [
        inner_loop(ours, 3, **path)(*data, step_weights=weights).loss for path in PATHS.values()
    ]
    want = found(ours, losses[0])
    for loss in losses[1:]:
        agree(found(ours, loss), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_learner_that_has_taken_steps(variant):
    """Its state goes on, and the gradient goes through it."""
    options = VARIANTS[variant] | {"inner_optimizer": OPTIMIZERS["adam"], "steps": 5}
    ours, data = learner(shared=True, **options), batch("mlp", 3)
    (x_s, y_s, _, _) = batch("mlp", 1)

    def ahead():
        clone = ours.clone()
        for _ in range(2):
            clone.adapt(torch.nn.functional.cross_entropy(clone(x_s[0]), y_s[0]))
        return clone

    def of(losses):
        params = list(ours.parameters())
        return torch.autograd.grad(losses.sum(), params)

    want = of(by_loop(ahead(), 3, data))
    assert any(g.abs().sum() > 0 for g in want)
    for path in PATHS.values():
        for a, b in zip(of(inner_loop(ahead(), 3, **path)(*data).loss), want, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("path", ["checkpoint", "adjoint", "each-adjoint"])
def test_no_graph_is_kept(path):
    def alive(steps):
        ours = learner(inner_optimizer=OPTIMIZERS["adam"], adapt_transform=True)
        out = inner_loop(ours, steps, **PATHS[path])(*batch("mlp", 3))
        seen, stack = set(), [out.loss.grad_fn]
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                stack += [n for n, _ in node.next_functions]
        return len(seen)

    assert alive(2) == alive(6)


@pytest.mark.parametrize("adapt", [False, True])
def test_the_adjoint_keeps_theta_and_the_state_alone(adapt, monkeypatch):
    kept = []

    class Watched(memory.Walk):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            kept.append(self)

    monkeypatch.setattr(memory, "Walk", Watched)
    ours = learner(inner_optimizer=OPTIMIZERS["adam"], adapt_transform=adapt)
    inner_loop(ours, 4, memory="adjoint")(*batch("mlp", 3))
    (walk,) = kept
    assert [len(s.inner.flat()) for s in walk.states] == [0, 8, 8, 8, 8]
    assert all(state.last is None for state in walk.states[:-1])
    tensors = [x for s in walk.states[1:] for x in (*s.theta, *s.inner.flat())]
    assert not any(x.requires_grad for x in tensors)


@pytest.mark.parametrize("path", ["adjoint", "checkpoint", "chunks"])
def test_differentiated_once(path):
    ours = learner(inner_optimizer=OPTIMIZERS["adam"])
    loss = inner_loop(ours, 2, **PATHS[path])(*batch("mlp", 3)).loss.sum()
    with pytest.raises(RuntimeError, match="expected memory='full' without chunks"):
        torch.autograd.grad(loss, list(ours.parameters()), create_graph=True)
