"""The named workloads: which learner, which tasks, which loss.

Sizes are the ones that are quoted; T (tasks), K (inner steps) and the width can be asked for.
Classes are seen through noise and every image has unit variance, so that gradients are those of
training and not of zeros; labels are balanced and grouped by class, as learn2learn samples them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkfo.nn import Flatten, Lambda
from fastkfo.vision import models

WAYS = 5
METHODS = ("maml", "kfo", "kfo-adapt", "meta-sgd", "meta-curvature")


class Tasks(NamedTuple):
    """A meta-batch: support and query, inputs ``[T, S, ...]`` and targets ``[T, S, ...]``."""

    x_s: Tensor
    y_s: Tensor
    x_q: Tensor
    y_q: Tensor


@dataclass(frozen=True)
class Workload:
    """What is learned, from what.

    Attributes:
        text: one line for people.
        learner: the adapted module, given its width.
        draw: tasks in float64, given their number, a generator and the width.
        loss: predictions and targets to a scalar.
        lr: the inner learning rate.
        tasks: T that is quoted.
        steps: K that is quoted.
        width: the width that is quoted.
        features: the module before the adapted one, trained and not adapted (ANIL), or None.
    """

    text: str
    learner: Callable[[int], nn.Module]
    draw: Callable[[int, torch.Generator, int], Tasks]
    loss: Callable[[Tensor, Tensor], Tensor]
    lr: float
    tasks: int
    width: int
    steps: int = 5
    features: Callable[[int], nn.Module] | None = None


def sinusoids(tasks: int, generator: torch.Generator, width: int, points: int = 10) -> Tasks:
    """Amplitudes 0.1 to 5, phases 0 to π, inputs -5 to 5 (Finn et al. 2017, section 5.1)."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    x = 10 * uniform(tasks, 2, points, 1) - 5
    amplitude, phase = 0.1 + 4.9 * uniform(tasks, 1, 1, 1), math.pi * uniform(tasks, 1, 1, 1)
    y = amplitude * torch.sin(x - phase)
    return Tasks(x[:, 0], y[:, 0], x[:, 1], y[:, 1])


def episodes(shots: int, *shape: int) -> Callable[[int, torch.Generator, int], Tasks]:
    """Few-shot classification: each class a random prototype, each sample that plus as much noise.

    Args:
        shots: samples per class, in the support and in the query.
        shape: of one sample; nothing for vectors as long as the learner is wide.

    Returns:
        What draws them.
    """

    def draw(tasks: int, generator: torch.Generator, width: int) -> Tasks:
        def normal(*size: int) -> Tensor:
            sample = shape or (width,)
            return torch.randn(*size, *sample, generator=generator, dtype=torch.float64)

        prototypes = normal(tasks, 1, WAYS, 1)
        x = (prototypes + normal(tasks, 2, WAYS, shots)) / math.sqrt(2)
        x = x.flatten(2, 3)  # [T, 2, ways * shots, ...], grouped by class
        y = torch.arange(WAYS).repeat_interleave(shots).expand(tasks, -1).contiguous()
        return Tasks(x[:, 0].contiguous(), y, x[:, 1].contiguous(), y)

    return draw


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def mean_of_pixels(x: Tensor) -> Tensor:
    """Global average pooling."""
    return x.mean(dim=[2, 3])


def conv_features(blocks: int, width: int) -> nn.Sequential:
    """Blocks of the KFO scripts for CIFAR-FS: stride 1, no pooling; then the mean of all pixels.

    Without the mean a head would have a Kronecker factor of four gigabytes.
    """
    base = models.ConvBase(
        hidden=width, channels=3, max_pool=False, layers=blocks, max_pool_factor=0.5
    )
    return nn.Sequential(base, Lambda(mean_of_pixels), Flatten())


def conv_learner(blocks: int) -> Callable[[int], nn.Module]:
    return lambda width: nn.Sequential(*conv_features(blocks, width), nn.Linear(width, WAYS))


def omniglot_fc(width: int) -> nn.Module:
    sizes = [width, width // 2, width // 4, width // 4]
    return models.OmniglotFC(input_size=784, output_size=WAYS, sizes=sizes)


def omniglot_cnn(width: int) -> nn.Module:
    """OmniglotCNN without its second name for the same convolutions.

    learn2learn's MetaSGD fails on a module that is registered twice, as `base` is there.
    """
    model = models.OmniglotCNN(WAYS, hidden_size=width)
    return nn.Sequential(model.features, model.classifier)


def miniimagenet(shots: int) -> Workload:
    return Workload(
        f"CNN4 with max-pooling, 84 x 84, 5-way {shots}-shot",
        lambda width: models.CNN4(WAYS, hidden_size=width),
        episodes(shots, 3, 84, 84),
        F.cross_entropy,
        lr=0.1,
        tasks=4,
        width=32,
    )


def cifarfs(blocks: int, tasks: int) -> Workload:
    return Workload(
        f"{blocks} x (conv 3 x 3, batch norm, ReLU), mean, 32 x 32, 5-way 5-shot",
        conv_learner(blocks),
        episodes(5, 3, 32, 32),
        F.cross_entropy,
        lr=0.1,
        tasks=tasks,
        width=32,
    )


WORKLOADS = {
    "sine-mlp": Workload(
        "1-40-40-1 MLP on sinusoids, 10 + 10 points",
        lambda width: mlp(1, width, width, 1),
        sinusoids,
        F.mse_loss,
        lr=0.01,
        tasks=32,
        width=40,
    ),
    "anil-head": Workload(
        "linear head, 64 features to 5 classes, 25 + 25",
        lambda width: nn.Linear(width, WAYS),
        episodes(5),
        F.cross_entropy,
        lr=0.1,
        tasks=16,
        width=64,
    ),
    "omniglot-fc": Workload(
        "784-256-128-64-64-5 with batch norm, 5-way 1-shot",
        omniglot_fc,
        episodes(1, 1, 28, 28),
        F.cross_entropy,
        lr=0.1,
        tasks=32,
        width=256,
    ),
    "omniglot-cnn": Workload(
        "4 x (conv 3 x 3 stride 2, batch norm, ReLU), mean, 28 x 28, 5-way 1-shot",
        omniglot_cnn,
        episodes(1, 1, 28, 28),
        F.cross_entropy,
        lr=0.1,
        tasks=16,
        width=64,
    ),
    "cifarfs-cnn-2": cifarfs(2, tasks=4),
    "cifarfs-cnn-4": cifarfs(4, tasks=16),
    "miniimagenet-cnn4": miniimagenet(1),
    "miniimagenet-cnn4-5shot": miniimagenet(5),
    "anil-cifarfs": Workload(
        "4 blocks once as features, their linear head adapted, 32 x 32, 5-way 5-shot",
        lambda width: nn.Linear(width, WAYS),
        episodes(5, 3, 32, 32),
        F.cross_entropy,
        lr=0.1,
        tasks=16,
        width=32,
        features=lambda width: conv_features(4, width),
    ),
}
