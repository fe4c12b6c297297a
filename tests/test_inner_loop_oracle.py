"""The fused inner loop against learn2learn's own in float64.

Every depth meets every width; the other options are dealt out to them evenly, in a fixed shuffle.
"""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from tests import oracle
from tests.cases import needs_native

pytestmark = needs_native

DEPTHS, WIDTHS = (0, 1, 2, 3, 4), (1, 3, 17, 40, 64, 128)
TASKS, STEPS = (1, 5, 32), (0, 1, 5, 10)
BETWEEN = (
    lambda n: [nn.ReLU()],
    lambda n: [nn.Tanh()],
    lambda n: [nn.BatchNorm1d(n), nn.LeakyReLU(0.1)],
    lambda n: [nn.LayerNorm(n), nn.GELU()],
    lambda n: [nn.SiLU()],
    lambda n: [nn.Sigmoid()],
    lambda n: [],
)


def kronecker(lib, **options):
    return lib.optim.KroneckerTransform(lib.nn.KroneckerLinear, **options)


KINDS = {
    "kfo": lambda lib, m: lib.algorithms.GBML(m, transform=kronecker(lib, psd=True), lr=0.05),
    "not psd": lambda lib, m: lib.algorithms.GBML(m, transform=kronecker(lib, psd=False), lr=0.05),
    "no bias": lambda lib, m: lib.algorithms.GBML(m, transform=kronecker(lib, bias=False), lr=0.05),
    "adapted": lambda lib, m: lib.algorithms.GBML(
        m, transform=kronecker(lib, psd=True), lr=0.05, adapt_transform=True
    ),
    "adapted, not psd": lambda lib, m: lib.algorithms.GBML(
        m, transform=kronecker(lib, psd=False), lr=0.05, adapt_transform=True
    ),
    "curvature": lambda lib, m: lib.algorithms.GBML(
        m, transform=lib.optim.MetaCurvatureTransform, lr=0.05
    ),
    "scale": lambda lib, m: lib.algorithms.GBML(
        m, transform=lambda p: lib.nn.Scale(p.shape), lr=0.05
    ),
    "maml": lambda lib, m: lib.algorithms.MAML(m, lr=0.05),
    "first order": lambda lib, m: lib.algorithms.MAML(m, lr=0.05, first_order=True),
    "meta-sgd": lambda lib, m: lib.algorithms.MetaSGD(m, lr=0.05),
}
LOSSES = (
    ("cross-entropy", F.cross_entropy),
    ("squares", F.mse_loss),
    ("sum", nn.CrossEntropyLoss(reduction="sum")),
)


def grid():
    """Depth, width, tasks, steps, what is between layers, kind, loss, with biases or without."""
    pairs = list(itertools.product(DEPTHS * 2, WIDTHS))
    others = [TASKS, STEPS, range(len(BETWEEN)), list(KINDS), range(len(LOSSES)), (True, False)]
    for seed, axis in enumerate(others):
        dealt = list(itertools.islice(itertools.cycle(axis), len(pairs)))
        random.Random(seed).shuffle(dealt)
        pairs = [(*row, value) for row, value in zip(pairs, dealt, strict=True)]
    return pairs


def model(depth, width, between, bias):
    sizes = [width, *[width] * depth]
    layers = []
    for m, n in itertools.pairwise(sizes):
        layers += [nn.Linear(m, n, bias=bias), *BETWEEN[between](n)]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 3, bias=bias)).double()


def data(width, tasks, loss):
    g = torch.Generator().manual_seed(width)
    x = torch.randn(2, tasks, 6, width, generator=g, dtype=torch.float64)
    y = torch.randint(3, (2, tasks, 6), generator=g)
    if loss == "squares":
        y = torch.randn(2, tasks, 6, 3, generator=g, dtype=torch.float64)
    return x[0], y[0], x[1], y[1]


def learner(lib, kind, *which):
    torch.manual_seed(0)
    made = KINDS[kind](lib, model(*which)).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return made


def by_learn2learn(theirs, loss, steps, x_s, y_s, x_q, y_q):
    losses = []
    for t in range(len(x_s)):
        clone = theirs.clone()
        for _ in range(steps):
            clone.adapt(loss(clone(x_s[t]), y_s[t]))
        losses.append(loss(clone(x_q[t]), y_q[t]))
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("depth", "width", "tasks", "steps", "between", "kind", "loss", "bias"), grid()
)
def test_equals_learn2learn(depth, width, tasks, steps, between, kind, loss, bias):
    loss_name, loss = LOSSES[loss]
    batch = data(width, tasks, loss_name)
    theirs = learner(oracle.load(), kind, depth, width, between, bias)
    ours = learner(fastkfo, kind, depth, width, between, bias)
    ours.load_state_dict(theirs.state_dict())
    want = by_learn2learn(theirs, loss, steps, *batch)
    want.sum().backward()
    found = fastkfo.InnerLoop(ours, loss, steps, backend="fused")(*batch).loss
    found.sum().backward()
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    pairs = [(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)]
    largest = max([float(g.norm()) for _, g in pairs if g is not None])
    for mine, g in pairs:
        if g is None:  # not used: no step, or no such operand
            assert mine is None or not mine.any()
            continue
        assert float((mine - g).norm()) <= 1e-10 * (float(g.norm()) + 1e-3 * largest)
