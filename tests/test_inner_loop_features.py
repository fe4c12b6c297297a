"""A feature extractor for all samples at once, and task after task: the same numbers.

Task after task it goes on PyTorch's kernels alone.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.inner_loop import forms, run
from tests.cases import needs_native


def pieces(norm):
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6)
    ).double()
    update = fastkfo.optim.KroneckerTransform(fastkfo.nn.KroneckerLinear)
    return features, fastkfo.algorithms.GBML(nn.Linear(6, 3), transform=update, lr=0.1).double()


def data(tasks=4):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, tasks, 5, 2, 4, 4, generator=g, dtype=torch.float64)
    y = torch.randint(3, (2, tasks, 5), generator=g)
    return x[0], y[0], x[1], y[1]


def go_alone(monkeypatch, large):
    """Task after task if a task has as many numbers."""
    monkeypatch.setattr(run, "LARGE_TASK", large)
    if large == 1:
        monkeypatch.setattr(forms, "has_kernels", lambda *_: False)


@pytest.mark.parametrize("backend", ["auto", "batched"])
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d,
        lambda n: nn.BatchNorm2d(n, affine=False, momentum=None),
        lambda n: nn.BatchNorm2d(n, track_running_stats=False),
        lambda n: nn.BatchNorm2d(n).eval(),
        lambda n: nn.GroupNorm(2, n),
    ],
    ids=["norm", "no weight", "no statistics", "eval", "groups"],
)
def test_task_after_task_is_the_same(norm, backend, monkeypatch, capsys):
    found = []
    for large in (1 << 15, 1):
        go_alone(monkeypatch, large)
        features, learner = copy.deepcopy(pieces(norm))
        loop = fastkfo.InnerLoop(learner, F.cross_entropy, 3, features=features, backend=backend)
        fastkfo.explain(loop, *data()[:2])
        assert ("features: task after task" in capsys.readouterr().out) == (large == 1)
        out = loop(*data())
        out.loss.sum().backward()
        grads = [p.grad for p in loop.parameters() if p.grad is not None]
        found.append([out.loss, out.predictions, *grads, *features.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_task_that_is_not_finite_stays_alone(monkeypatch):
    go_alone(monkeypatch, 1)
    features, learner = pieces(nn.BatchNorm2d)
    loop = fastkfo.InnerLoop(learner, F.cross_entropy, 2, features=features)
    x_s, y_s, x_q, y_q = data()
    x_s[1, 0, 0, 0, 0] = torch.nan
    out = loop(x_s, y_s, x_q, y_q)
    assert out.finite.tolist() == [True, False, True, True]
    out.loss[out.finite].sum().backward()
    assert all([p.grad.isfinite().all() for p in loop.parameters() if p.grad is not None])


@needs_native
def test_on_kernels_of_our_own_they_are_together(monkeypatch, capsys):
    monkeypatch.setattr(run, "LARGE_TASK", 1)
    features, learner = pieces(nn.BatchNorm2d)
    loop = fastkfo.InnerLoop(learner, F.cross_entropy, 2, features=features)
    fastkfo.explain(loop, *data()[:2])
    assert "features: all samples" in capsys.readouterr().out
