"""One method of `fastkfo reproduce` from one seed: trained at every rate, validated, tested."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fastkfo.cli.reproduce_problems import Problem, Sampler, learner_of, sampler
from fastkfo.inner_loop import InnerLoop
from fastkfo.tasks import Episodes

__all__ = ["Examined", "Measured", "Scores", "examine", "trained"]

#: Largest norm of a meta-gradient that Adam gets; larger ones are scaled down to it.
CLIP = 10.0


@dataclass(frozen=True)
class Scores:
    """Means over tasks.

    Attributes:
        loss: Query loss; inf where one was not finite.
        accuracy: Of predictions, or None for regression; tasks that are not finite count as 0.
    """

    loss: float
    accuracy: float | None

    @property
    def score(self) -> float:
        """The accuracy if there is one, else the loss."""
        return self.loss if self.accuracy is None else self.accuracy


@dataclass(frozen=True)
class Measured:
    """A learner that was trained at one rate.

    Attributes:
        rate: Inner learning rate.
        skipped: Meta-iterations whose loss or gradient was not finite; nothing moved in them.
        validation: After K steps.
        test: After K steps.
    """

    rate: float
    skipped: int
    validation: Scores
    test: Scores


@dataclass(frozen=True)
class Examined:
    """One method from one seed, on one exam.

    Attributes:
        problem: Its name.
        exam: Its name.
        method: Its label.
        seed: Of weights and tasks.
        rates: At every rate of the grid.
        chosen: The rate with the best validation score; the lower of two alike.
        curve: Test scores at that rate after 0, 1, … 2 K steps.
    """

    problem: str
    exam: str
    method: str
    seed: int
    rates: tuple[Measured, ...]
    chosen: float
    curve: tuple[Scores, ...]

    @property
    def test(self) -> Scores:
        """At the chosen rate, after K steps."""
        return next(m.test for m in self.rates if m.rate == self.chosen)


def examine(problem: Problem, kind: str, seed: int) -> list[Examined]:
    """Trains one method at every rate of the grid, and examines it.

    Args:
        problem: Which.
        kind: Of the method.
        seed: Of weights and tasks: those of all methods are the same.

    Returns:
        One entry per exam.
    """
    loops = {rate: trained(problem, kind, rate, seed) for rate in problem.rates}
    return [_examined(problem, kind, seed, exam, loops) for exam, _ in problem.exams]


def trained(problem: Problem, kind: str, rate: float, seed: int) -> tuple[InnerLoop, int]:
    """Meta-trains a learner.

    Args:
        problem: What on.
        kind: Of the method.
        rate: Inner learning rate.
        seed: Of weights and tasks.

    Returns:
        Its inner loop, and how many iterations were skipped.
    """
    loop = InnerLoop(learner_of(problem, kind, rate, seed), problem.loss, problem.steps)
    taken = list(training(loop, problem, sampler(problem, "train", seed)))
    return loop, taken.count(False)


def training(loop: InnerLoop, problem: Problem, sample: Sampler) -> Iterator[bool]:
    """Takes a step of Adam per iteration, and tells whether the gradient was finite.

    Args:
        loop: What is trained.
        problem: How.
        sample: Draws tasks.

    Yields:
        Whether the step was taken.
    """
    parameters = list(loop.learner.parameters())
    optimizer = torch.optim.Adam(parameters, lr=problem.meta_lr)
    for iteration in range(problem.iterations):
        falling = 0.5 + 0.5 * math.cos(math.pi * iteration / problem.iterations)
        optimizer.param_groups[0]["lr"] = problem.meta_lr * falling
        optimizer.zero_grad()
        loss = loop(*sample(problem.meta_batch)).loss.mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, CLIP)
        finite = math.isfinite(loss.item() + norm.item())
        if finite:
            optimizer.step()
        yield finite


def _examined(
    problem: Problem, kind: str, seed: int, exam: str, loops: dict[float, tuple[InnerLoop, int]]
) -> Examined:
    validation = sampler(problem, "validation", seed, exam)(problem.validation_tasks)
    test = sampler(problem, "test", seed, exam)(problem.test_tasks)
    measured = [
        Measured(rate, skipped, *(_scores(problem, loop, tasks) for tasks in (validation, test)))
        for rate, (loop, skipped) in loops.items()
    ]
    sign = -1 if problem.accuracy else 1
    chosen = min(measured, key=lambda m: sign * m.validation.score).rate
    curve = [
        _scores(problem, loops[chosen][0], test, steps) for steps in range(2 * problem.steps + 1)
    ]
    label = dict(problem.methods)[kind]
    return Examined(problem.name, exam, label, seed, tuple(measured), chosen, tuple(curve))


@torch.no_grad()
def _scores(problem: Problem, loop: InnerLoop, tasks: Episodes, steps: int | None = None) -> Scores:
    outcome = loop(*tasks, steps=steps)
    loss = outcome.loss.double().mean().item()
    loss = loss if math.isfinite(loss) else math.inf
    if not problem.accuracy:
        return Scores(loss, None)
    right = (outcome.predictions.argmax(-1) == tasks.y_q).double().mean(1)
    finite = outcome.predictions.isfinite().flatten(1).all(1)
    return Scores(loss, (right * finite).mean().item())
