"""The learners and tasks that are timed, each seeded; K = 5 inner steps, float32."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 5


class Workload(NamedTuple):
    """A model, its loss, and a meta-batch of tasks (x_s, y_s, x_q, y_q)."""

    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    tasks: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    lr: float


def _classification(tasks: int, samples: int, *shape: int, ways: int = 5) -> list[Any]:
    x = torch.randn(tasks, 2, samples, *shape)
    y = torch.arange(samples) % ways
    return [(x[t, 0], y, x[t, 1], y) for t in range(tasks)]


def _mlp(sizes: list[int], norm: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for n, m in pairwise(sizes[:-1]):
        layers += [nn.Linear(n, m), *([nn.BatchNorm1d(m)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def _cnn(blocks: int, channels: int, hidden: int, stride: int, features: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += [
            nn.Conv2d(channels, hidden, 3, stride=stride, padding=1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
        ]
        channels = hidden
    # A head on all 32 x 32 x 32 features would have a Kronecker factor of four gigabytes.
    pool = [nn.AdaptiveAvgPool2d(1)] if features == hidden else []
    return nn.Sequential(*layers, *pool, nn.Flatten(), nn.Linear(features, 5))


def sine_mlp() -> Workload:
    """1-40-40-1, ReLU, mean squared error; 32 tasks of 10 + 10 points."""
    x = 10 * torch.rand(32, 2, 10, 1) - 5
    y = (1 + 4 * torch.rand(32, 1, 1, 1)) * torch.sin(x + 3 * torch.rand(32, 1, 1, 1))
    tasks = [(x[t, 0], y[t, 0], x[t, 1], y[t, 1]) for t in range(32)]
    return Workload(lambda: _mlp([1, 40, 40, 1], False), F.mse_loss, tasks, 0.01)


def anil_head() -> Workload:
    """A linear head from 64 features to 5 classes; 16 tasks of 25 + 25."""
    return Workload(lambda: nn.Linear(64, 5), F.cross_entropy, _classification(16, 25, 64), 0.1)


def omniglot_fc() -> Workload:
    """784-256-128-64-64-5 with batch norm; 32 tasks of 5 + 5."""
    sizes = [784, 256, 128, 64, 64, 5]
    return Workload(lambda: _mlp(sizes, True), F.cross_entropy, _classification(32, 5, 784), 0.1)


def omniglot_cnn() -> Workload:
    """Four blocks (convolution 3 x 3, stride 2, 64 channels, batch norm, ReLU); 16 tasks."""
    tasks = _classification(16, 5, 1, 28, 28)
    return Workload(lambda: _cnn(4, 1, 64, 2, 256), F.cross_entropy, tasks, 0.1)


def cifarfs_cnn2() -> Workload:
    """Two blocks (convolution 3 x 3, 32 channels, batch norm, ReLU), mean; 4 tasks of 25."""
    tasks = _classification(4, 25, 3, 32, 32)
    return Workload(lambda: _cnn(2, 3, 32, 1, 32), F.cross_entropy, tasks, 0.1)


WORKLOADS = {
    "sine-mlp": sine_mlp,
    "anil-head": anil_head,
    "omniglot-fc": omniglot_fc,
    "omniglot-cnn": omniglot_cnn,
    "cifarfs-cnn-2": cifarfs_cnn2,
}

METHODS = ("maml", "kfo", "kfo-adapt", "meta-sgd", "meta-curvature")


def make_learner(l2l: Any, workload: Workload, method: str) -> nn.Module:
    """A learner of one library (learn2learn or fastkfo) from the seed."""
    torch.manual_seed(0)
    model = workload.model()
    if method == "maml":
        return l2l.algorithms.MAML(model, lr=workload.lr)
    if method == "meta-sgd":
        return l2l.algorithms.MetaSGD(model, lr=workload.lr)
    if method == "meta-curvature":
        return l2l.algorithms.GBML(model, l2l.optim.MetaCurvatureTransform, lr=workload.lr)
    transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)
    return l2l.algorithms.GBML(
        model, transform, lr=workload.lr, adapt_transform=method == "kfo-adapt"
    )


def meta_gradient(learner: Any, workload: Workload) -> list[Tensor | None]:
    """learn2learn's own loop over tasks; the gradients of all of the learner's parameters."""
    for p in learner.parameters():
        p.grad = None
    for x_s, y_s, x_q, y_q in workload.tasks:
        clone = learner.clone()
        for _ in range(STEPS):
            clone.adapt(workload.loss(clone(x_s), y_s))
        workload.loss(clone(x_q), y_q).backward()
    return [p.grad for p in learner.parameters()]
