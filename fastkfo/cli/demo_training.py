"""The demo's three phases: training, testing on unseen digits, timing; any can be cut short."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from fastkfo.cli.demo_methods import Run, Settings
from fastkfo.cli.interrupts import Interrupts
from fastkfo.tasks import DigitTasks, Episodes

__all__ = ["TaskSets", "measure", "test", "train"]

# Of the training time: the first validation is at this share, later ones further apart, up to
# 1 / VALIDATIONS. At most LARGEST_RESERVE of it is set aside for testing and timing.
FIRST_VALIDATION, VALIDATIONS = 0.01, 20
LARGEST_RESERVE = 0.35
Notify = Callable[[float, str], None]


class TaskSets:
    """The three task distributions, and the fixed validation and test tasks.

    Args:
        settings: The demo's options.
    """

    def __init__(self, settings: Settings) -> None:
        shape = (settings.ways, settings.shots, settings.queries)
        self.train = DigitTasks("train", *shape, seed=settings.seed)
        self.valid = DigitTasks("valid", *shape, seed=settings.seed).sample(settings.valid_tasks)
        self.test = DigitTasks("test", *shape, seed=settings.seed).sample(settings.test_tasks)


def train(
    runs: list[Run],
    tasks: TaskSets,
    settings: Settings,
    interrupts: Interrupts,
    notify: Notify,
) -> None:
    """Trains all runs in turn, on the same tasks, until the iterations are done or time is up.

    What testing and timing will need is set aside, by what the first validation and iterations
    took. A run whose meta-gradient is not finite keeps its parameters and stops there.

    Args:
        runs: What to train; ``losses``, ``curve`` and ``failure`` are filled in.
        tasks: Where tasks come from.
        settings: The demo's options.
        interrupts: Ends the training when a signal has come.
        notify: Called with the share that is done, and what to show.
    """
    start = time.perf_counter()
    budget = 60 * settings.minutes
    if not _validate(runs, 0, tasks.valid, settings.steps, interrupts):
        return
    validation = time.perf_counter() - start
    notify(0.0, _summary(runs, 0))
    iteration, fastest, next_validation = 0, math.inf, FIRST_VALIDATION
    while interrupts.signal is None and any(run.failure is None for run in runs):
        before = time.perf_counter()
        testing = 2 * validation * settings.test_tasks / settings.valid_tasks
        # The plain loop may take twice as long as ours, hence 3.
        timing = 3 * settings.rounds * fastest if iteration else 0.0
        share = max(
            (before - start) / (budget - min(testing + timing, LARGEST_RESERVE * budget)),
            iteration / settings.iterations,
        )
        if share >= 1 and iteration > 0:
            break
        batch = tasks.train.sample(settings.meta_batch)
        iteration += 1
        for run in runs:
            if run.failure is None:
                _meta_step(run, batch, iteration)
        now = time.perf_counter()
        fastest = min(fastest, now - before)
        notify(share, f"{iteration / (now - start):.1f} it/s")
        if share >= next_validation and interrupts.signal is None:
            if not _validate(runs, iteration, tasks.valid, settings.steps, interrupts):
                break
            validation = min(validation, time.perf_counter() - now)
            next_validation = share + min(max(share / 2, FIRST_VALIDATION), 1 / VALIDATIONS)
            notify(share, _summary(runs, iteration))
    if interrupts.signal is None and runs[0].curve[-1][0] != iteration:
        _validate(runs, iteration, tasks.valid, settings.steps, interrupts)
        notify(1.0, _summary(runs, iteration))


def test(
    runs: list[Run], tasks: Episodes, steps: int, interrupts: Interrupts, notify: Notify
) -> None:
    """Measures accuracy on test tasks before and after each of ``steps`` inner steps.

    Args:
        runs: What to test; ``test`` and ``not_finite`` are filled in, for as many tasks as were
            done when a signal came.
        tasks: The test tasks.
        steps: Inner steps; more than in training shows what comes after.
        interrupts: Ends the testing when a signal has come.
        notify: Called with the share of tasks that is done, and what to show.
    """
    accuracies = _evaluate(runs, tasks, steps, interrupts, notify)
    for run, (values, not_finite) in zip(runs, accuracies, strict=True):
        run.test = values if len(values) else None
        run.not_finite = not_finite


def measure(
    runs: list[Run], tasks: TaskSets, settings: Settings, interrupts: Interrupts, notify: Notify
) -> None:
    """Times both implementations in interleaved rounds, and compares their meta-gradients.

    Args:
        runs: What to time; ``reference_seconds``, ``fastkfo_seconds`` and ``differences`` are
            filled in. Parameters stay as they are.
        tasks: Where tasks come from; each round draws new ones.
        settings: The demo's options.
        interrupts: Ends the timing when a signal has come.
        notify: Called with the share of rounds that is done, and what to show.
    """
    for index in range(-1, settings.rounds):  # round -1 warms up
        batch = tasks.train.sample(settings.meta_batch)
        for run in runs:
            if interrupts.signal is not None:
                return
            times = {}
            for ours in (True, False) if index % 2 else (False, True):
                start = time.perf_counter()
                if ours:
                    run.meta_gradient(batch)
                else:
                    reference = run.reference_gradient(batch)
                times[ours] = time.perf_counter() - start
            if index >= 0:
                run.reference_seconds.append(times[False])
                run.fastkfo_seconds.append(times[True])
                run.differences.append(run.difference(reference))
        notify((index + 1) / settings.rounds, "")


def _meta_step(run: Run, batch: Episodes, iteration: int) -> None:
    loss = run.meta_gradient(batch)
    gradients = [p.grad for p in run.learner.parameters() if p.grad is not None]
    if not math.isfinite(loss):
        run.failure = f"iteration {iteration}: the query loss was {loss}"
    elif not all(bool(g.isfinite().all()) for g in gradients):
        run.failure = f"iteration {iteration}: the meta-gradient was not finite"
    else:
        run.optimizer.step()
        run.losses.append(loss)


def _validate(
    runs: list[Run], iteration: int, tasks: Episodes, steps: int, interrupts: Interrupts
) -> bool:
    """Adds a point to every curve, unless a signal cuts it short; tells whether it did."""
    results = _evaluate(runs, tasks, steps, interrupts)
    if len(results[0][0]) < len(tasks.x_s):
        return False
    for run, (values, _) in zip(runs, results, strict=True):
        if run.failure is None or len(run.curve) == 0:
            run.curve.append((iteration, values))
    return True


def _evaluate(
    runs: list[Run],
    tasks: Episodes,
    steps: int,
    interrupts: Interrupts,
    notify: Notify | None = None,
) -> list[tuple[torch.Tensor, int]]:
    """Evaluates all runs task by task; returns accuracies [done, steps + 1] and failures each."""
    values: list[list[list[float]]] = [[] for _ in runs]
    not_finite = [0] * len(runs)
    for index, task in enumerate(zip(*tasks, strict=True)):
        if interrupts.signal is not None:
            break
        for i, run in enumerate(runs):
            accuracies, finite = run.accuracies(*task, steps)
            values[i].append(accuracies)
            not_finite[i] += not finite
        if notify is not None:
            notify((index + 1) / len(tasks.x_s), "")
    return [(torch.tensor(v), n) for v, n in zip(values, not_finite, strict=True)]


def _summary(runs: list[Run], iteration: int) -> str:
    scores = (
        f"{run.name} {100 * run.curve[-1][1][:, -1].mean().item():.1f} %"
        + (" (stopped)" if run.failure else "")
        for run in runs
    )
    return f"iteration {iteration}: {', '.join(scores)}"
