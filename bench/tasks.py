"""What sampling a meta-batch costs, beside one meta-gradient of a learner for such tasks.

    python -m bench.tasks             # five minutes; needs a quiet machine

Each round draws a meta-batch and takes its meta-gradient by `fastkfo.InnerLoop`, with KFO and with
MAML, whose step is shorter. A distribution is timed only after what it draws was looked at. Images
are random: no data are needed. Record: `results/<machine>/tasks/`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import fastkfo
from bench import clock, machine
from bench.problem import Learned, Problem
from bench.records import RESULTS
from fastkfo.tasks import (
    DigitTasks,
    DrawAhead,
    Episodes,
    FewShotTasks,
    SinusoidTasks,
    TaskDistribution,
)
from fastkfo.tasks.augmentations import Compose, HorizontalFlip, Normalize, RandomCrop

WARM, BUDGET_S, MOST = 1, 6.0, 300


@dataclass(frozen=True)
class Case:
    """A distribution, and the workload whose learner takes its tasks.

    Attributes:
        text: one line for people.
        workload: a name in `bench.workloads.WORKLOADS`.
        tasks: T.
        make: the distribution, given the device.
        flat: whether the learner wants vectors.
        together: rounds whose mean is one reading.
    """

    text: str
    workload: str
    tasks: int
    make: Callable[[str], TaskDistribution]
    flat: bool = False
    together: int = 1


def omniglot(device: str) -> TaskDistribution:
    """1,200 classes of 20 images, at four rotations."""
    images = torch.randint(256, (24_000, 1, 28, 28), dtype=torch.uint8)
    labels = torch.arange(1_200).repeat_interleave(20)
    return FewShotTasks(images, labels, 5, 1, 1, rotations=4, device=device)


def cifarfs(augment: Any = None) -> Callable[[str], TaskDistribution]:
    """64 classes of 600 images."""

    def make(device: str) -> TaskDistribution:
        images = torch.randint(256, (38_400, 3, 32, 32), dtype=torch.uint8)
        labels = torch.arange(64).repeat_interleave(600)
        return FewShotTasks(images, labels, 5, 5, 5, augment=augment, device=device)

    return make


def features(device: str) -> TaskDistribution:
    """64 classes of 600 feature vectors."""
    labels = torch.arange(64).repeat_interleave(600)
    return FewShotTasks(torch.randn(38_400, 64), labels, 5, 5, 5, device=device)


AUGMENT = Compose(RandomCrop(4), HorizontalFlip(), Normalize((0.5,) * 3, (0.25,) * 3))
CASES = [
    Case("SinusoidTasks, 10 + 10 points", "sine-mlp", 32, lambda d: SinusoidTasks(device=d)),
    Case("FewShotTasks, 64 classes x 600 vectors of 64, 5-way 5 + 5", "anil-head", 16, features),
    Case(
        "the same, 16 meta-batches ahead",
        "anil-head", 16, lambda d: DrawAhead(features(d), 16), together=16,
    ),
    Case(
        "DigitTasks, 5-way 5 + 15, a linear head on 64 pixels",
        "anil-head", 16, lambda d: DigitTasks("train", 5, 5, 15, device=d), flat=True,
    ),
    Case("FewShotTasks, 1,200 classes x 20, rotated, 5-way 1 + 1", "omniglot-cnn", 32, omniglot),
    Case("FewShotTasks, 64 classes x 600, 5-way 5 + 5", "cifarfs-cnn-2", 16, cifarfs()),
    Case(
        "the same with crop, flip and normalisation", "cifarfs-cnn-2", 16, cifarfs(AUGMENT)
    ),
]  # fmt: skip


def step(problem: Problem) -> Callable[[Episodes], None]:
    """One meta-gradient of what was drawn."""
    learner = problem.learner(fastkfo)
    learned = Learned(None, learner)
    inner_loop = fastkfo.InnerLoop(learner, problem.loss, problem.steps)

    def run(episodes: Episodes) -> None:
        learned.clear()
        inner_loop(*episodes).loss.mean().backward()

    return run


def gate(episodes: Episodes, tasks: int) -> None:
    """Raises unless no task holds one sample twice, or labels in unlike numbers.

    Raises:
        RuntimeError: One does.
    """
    x = torch.cat([episodes.x_s, episodes.x_q], 1).flatten(2)
    for task in range(tasks):
        if len(x[task].unique(dim=0)) < x.shape[1]:
            raise RuntimeError(f"task {task} holds a sample twice")
        for y in (episodes.y_s, episodes.y_q):
            if not y.is_floating_point() and len(set(y[task].bincount().tolist())) > 1:
                raise RuntimeError(f"task {task} is not balanced")


def measure(case: Case, method: str, device: str) -> dict[str, Any]:
    """Medians of interleaved rounds, and the quartiles of sampling's share.

    Where one round in 16 draws for all of them, a reading is the mean of 16 rounds.
    """
    torch.manual_seed(0)
    distribution = case.make(device)
    gate(distribution.sample(case.tasks), case.tasks)
    problem = Problem.named(case.workload, method, tasks=case.tasks)
    run = step(replace(problem, device=device))
    episodes = distribution.sample(case.tasks)

    def draw() -> None:
        nonlocal episodes
        episodes = distribution.sample(case.tasks)

    def take() -> None:
        run(flat(episodes) if case.flat else episodes)

    sampling: list[float] = []
    stepping: list[float] = []
    elsewhere = clock.Elsewhere()
    fewest = (WARM + 5) * case.together
    while len(stepping) < fewest or (sum(stepping) < BUDGET_S and len(stepping) < MOST):
        sampling.append(clock.seconds(draw, device))
        stepping.append(clock.seconds(take, device))
    busy = elsewhere.cores()
    sampling = means(sampling, case.together)[WARM:]
    stepping = means(stepping, case.together)[WARM:]
    shares = [a / b for a, b in zip(sampling, stepping, strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    return {
        "distribution": case.text,
        "learner": case.workload,
        "method": method,
        "tasks": case.tasks,
        "readings": len(shares),
        "sample_ms": round(1e3 * statistics.median(sampling), 4),
        "step_ms": round(1e3 * statistics.median(stepping), 3),
        "share": round(middle, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "elsewhere": None if busy is None else round(busy, 2),
    }


def means(values: list[float], together: int) -> list[float]:
    """Of so many values each; what is left over is left out."""
    whole = len(values) // together * together
    return [statistics.fmean(values[i : i + together]) for i in range(0, whole, together)]


def flat(episodes: Episodes) -> Episodes:
    """Images as vectors."""
    x_s, y_s, x_q, y_q = episodes
    return Episodes(x_s.flatten(2), y_s, x_q.flatten(2), y_q)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = machine.environment(device)
    rows = []
    for case in CASES:
        for method in ("kfo", "maml"):
            rows.append(measure(case, method, device))
            print(rows[-1], flush=True)
    folder = RESULTS / environment["machine"] / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment, "rows": rows}, indent=1)
    (folder / "sampling.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
