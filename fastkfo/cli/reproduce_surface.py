"""The loss surface of y = a b x, and how MAML's initialisation of (a, b) adapts on it.

Tasks are y = w x with w ~ N(0, 1) and x ~ N(0, 1). Surfaces and paths are those of infinitely many
points: the loss of a task is (a b − w)², and a step of rate α takes (a, b) to
(a − 2 α b (a b − w), b − 2 α a (a b − w)). The training is that of `PROBLEMS`, on samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastkfo.cli.reproduce_problems import Problem, learner_of, sampler
from fastkfo.cli.reproduce_training import training
from fastkfo.inner_loop import InnerLoop

__all__ = ["RATE", "TASKS", "Surface", "adapted", "meta_loss", "surface"]

RATE = 0.1
TASKS = (-2.0, -1.0, 1.0, 2.0)


@dataclass(frozen=True)
class Surface:
    """What MAML made of (a, b).

    Attributes:
        rate: α.
        path: Of the first seed: (a, b) at the start and along the training, ``[N, 2]``.
        ends: (a, b) after training, ``[seeds, 2]``.
        tasks: w of the tasks that are drawn.
        adaptations: (a, b) of each task after 0, 1, 2, 3 steps from the first end,
            ``[tasks, 4, 2]``.
    """

    rate: float
    path: list[list[float]]
    ends: list[list[float]]
    tasks: list[float]
    adaptations: list[list[list[float]]]


def surface(problem: Problem, seeds: int) -> Surface:
    """Trains the deep model of the one-dimensional problem.

    Args:
        problem: With one input and one step.
        seeds: How many, from 0.

    Returns:
        Paths and ends.
    """
    paths = [_path(problem, seed) for seed in range(seeds)]
    point = torch.tensor(paths[0][-1], dtype=torch.float64).expand(len(TASKS), 2)
    w = torch.tensor(TASKS, dtype=torch.float64)
    steps = [point]
    for _ in range(3):
        steps.append(adapted(steps[-1], w, RATE))
    return Surface(
        RATE,
        paths[0],
        [path[-1] for path in paths],
        list(TASKS),
        torch.stack(steps, 1).tolist(),
    )


def _path(problem: Problem, seed: int) -> list[list[float]]:
    loop = InnerLoop(learner_of(problem, "linnet", RATE, seed), problem.loss, problem.steps)
    points = [_point(loop)]
    for index, _ in enumerate(training(loop, problem, sampler(problem, "train", seed))):
        if index % 10 == 9 or index == problem.iterations - 1:
            points.append(_point(loop))
    return points


def _point(loop: InnerLoop) -> list[float]:
    return [p.item() for p in loop.learner.parameters()]


def adapted(point: Tensor, w: Tensor, rate: float) -> Tensor:
    """Takes one step on the loss of infinitely many points.

    Args:
        point: (a, b), ``[..., 2]``.
        w: Of the task, ``[...]``.
        rate: α.

    Returns:
        (a, b) after it, ``[..., 2]``.
    """
    a, b = point.unbind(-1)
    residual = 2 * rate * (a * b - w)
    return torch.stack([a - residual * b, b - residual * a], -1)


def meta_loss(point: Tensor, rate: float, count: int = 99) -> Tensor:
    """The mean loss after one step, over w ~ N(0, 1).

    Args:
        point: (a, b), ``[..., 2]``.
        rate: α; 0 gives the loss without adaptation.
        count: Of quantiles that stand for N(0, 1).

    Returns:
        The mean, ``[...]``.
    """
    levels = (torch.arange(count, dtype=point.dtype) + 0.5) / count
    w = torch.special.ndtri(levels)
    after = adapted(point[..., None, :].expand(*point.shape[:-1], count, 2), w, rate)
    return (after.prod(-1) - w).square().mean(-1)
