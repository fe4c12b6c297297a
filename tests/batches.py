"""Meta-batches for the learners of tests/models.py, and what learn2learn's loop makes of them."""

import functools
import warnings
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastkfo
from tests.models import Outcome, learner_of, meta_iteration, task
from tests.oracle import learn2learn

# What each model needs to be adapted at all.
NEEDS = {
    "unused": {"allow_unused": True},
    "frozen": {"allow_nograd": True, "allow_unused": True},
}

OURS_ALONE = ("conv1d", "conv3d", "scalar")  # learn2learn has no transform for such parameters


def batch(name, tasks):
    """x_s, y_s, x_q, y_q of T tasks."""
    return tuple(torch.stack(x) for x in zip(*[task(name, t) for t in range(tasks)], strict=True))


def learner(name, transform, **options):
    """Ours."""
    return learner_of(fastkfo, name, transform, **NEEDS.get(name, {}), **options)


@functools.cache
def oracle(name, transform, tasks, steps, **options):
    """learn2learn's outcome; where it crashes, that of our own loop, which is tested elsewhere."""
    crashes = name in OURS_ALONE or (
        options.get("adapt_transform") and (options.get("first_order") or transform == "none")
    )
    options = NEEDS.get(name, {}) | options
    with sdpa_kernel(SDPBackend.MATH):  # its own double backward would fail otherwise
        theirs = learner_of(fastkfo if crashes else learn2learn(), name, transform, **options)
        found = meta_iteration(theirs, name, steps, tasks=tasks)
    each, model = len(list(theirs.parameters())), len(list(theirs.module.parameters()))
    return found._replace(adapted=[x for k, x in enumerate(found.adapted) if k % each < model])


def outcome(ours, losses, adapted=()):
    """Differentiate the sum of the losses; the outcome in the oracle's form."""
    losses.sum().backward()
    return Outcome(
        list(losses.detach()), list(adapted), {n: p.grad for n, p in ours.named_parameters()}
    )


def without_zeros(found, want):
    """Zeros where the oracle has None: a fused call gives every operand a gradient."""
    grads = {
        n: None if want.grads[n] is None and g is not None and not g.any() else g
        for n, g in found.grads.items()
    }
    want = {
        n: None if grads[n] is None and g is not None and not g.any() else g
        for n, g in want.grads.items()
    }
    return found._replace(grads=grads), want


def by_learner(name, transform, tasks, steps, **options):
    """The outcome of a batched learner."""
    ours = learner(name, transform, **options)
    x_s, y_s, x_q, y_q = batch(name, tasks)
    loss = fastkfo.per_task(F.cross_entropy)
    clone = ours.clone(tasks=tasks)
    for _ in range(steps):
        clone.adapt(loss(clone(x_s), y_s))
    adapted = [p.detach() for t in range(tasks) for p in clone.task(t).parameters()]
    return outcome(ours, loss(clone(x_q), y_q), adapted)


def by_inner_loop(name, transform, tasks, steps, inner=None, **options):
    """The outcome of an InnerLoop with the options `inner`."""
    ours = learner(name, transform, **options)
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, steps, **(inner or {}))
    return outcome(ours, loop(*batch(name, tasks)).loss)


@contextmanager
def no_warnings():
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
