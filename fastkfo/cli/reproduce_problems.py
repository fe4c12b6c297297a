"""What `fastkfo reproduce` compares: its problems, their tasks, and who adapts to them.

The paper's settings for its illustrative results are not published: these are our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkfo.algorithms import GBML, MAML
from fastkfo.nn import KroneckerLinear, split_linear
from fastkfo.optim import KroneckerTransform
from fastkfo.tasks import (
    BinaryClassificationTasks,
    DigitTasks,
    Episodes,
    LinearRegressionTasks,
    TaskDistribution,
)

__all__ = [
    "PROBLEMS",
    "QUICK_ITERATIONS",
    "SPLITS",
    "Problem",
    "Sampler",
    "learner_of",
    "quick",
    "sampler",
]

SPLITS = ("train", "validation", "test")
DEPTH = 2  # factors of a Deep or LinNet model
LARGEST_OVER_SMALLEST = 10.0
QUICK_ITERATIONS = 8
Sampler = Callable[[int], Episodes]


@dataclass(frozen=True)
class Problem:
    """A distribution of tasks, the models that are compared on it, and how all are trained.

    Attributes:
        name: For files and options.
        title: For people.
        accuracy: Whether the score is the accuracy (higher is better); else the squared error.
        methods: Kind of each method and its label.
        exams: What is validated and tested on: name and title.
        inputs: Length of x.
        outputs: Of the model.
        scales: Whether the inputs' scales differ, by a factor of 10 from first to last.
        shots: Support points (per class).
        queries: Query points (per class).
        steps: Inner steps, K.
        rates: The grid of inner learning rates.
        iterations: Meta-iterations.
        meta_lr: Of Adam, at the start; it falls to zero along a half cosine.
        meta_batch: Tasks per iteration.
        validation_tasks: That choose the inner learning rate.
        test_tasks: That the table is of.
    """

    name: str
    title: str
    accuracy: bool
    methods: tuple[tuple[str, str], ...]
    inputs: int
    outputs: int
    shots: int
    queries: int
    steps: int
    rates: tuple[float, ...]
    scales: bool = False
    exams: tuple[tuple[str, str], ...] = (("new-tasks", "new tasks"),)
    iterations: int = 400
    meta_lr: float = 0.03
    meta_batch: int = 16
    validation_tasks: int = 200
    test_tasks: int = 400

    @property
    def loss(self) -> Callable[..., Tensor]:
        """Cross-entropy, or the mean squared error."""
        return F.cross_entropy if self.accuracy else F.mse_loss


_REGRESSION = (("shallow", "Shallow"), ("linnet", "Deep"), ("kfo", "Shallow + KFO"))
_BINARY = (("shallow", "LogR"), ("linnet", "LogR + LinNet"), ("kfo", "LogR + KFO"))
_DIGITS = (
    ("shallow", "Softmax"), ("linnet", "Softmax + LinNet"), ("kfo", "Softmax + KFO"),
    ("mlp", "MLP (ReLU)"),
)  # fmt: skip


def _doubling(first: float, count: int = 6) -> tuple[float, ...]:
    return tuple(first * 2**i for i in range(count))


_LINE = Problem(
    "line", "Regression in one dimension, one step", False, _REGRESSION,
    inputs=1, outputs=1, shots=10, queries=10, steps=1, rates=_doubling(0.025),
)  # fmt: skip
_REGRESSIONS = Problem(
    "regression", "Linear regression, inputs of unequal scale", False, _REGRESSION,
    inputs=5, outputs=1, shots=20, queries=20, steps=5, rates=_doubling(0.025), scales=True,
)  # fmt: skip
_CLASSES = Problem(
    "classification", "Binary classification, inputs of unequal scale", True, _BINARY,
    inputs=5, outputs=2, shots=10, queries=10, steps=5, rates=_doubling(0.5), scales=True,
)  # fmt: skip

#: In the order of the report. The control of a problem has inputs of equal scale.
PROBLEMS = (
    _REGRESSIONS,
    replace(
        _REGRESSIONS, name="regression-equal", scales=False,
        title="Linear regression, inputs of equal scale",
    ),
    _CLASSES,
    replace(
        _CLASSES, name="classification-equal", scales=False,
        title="Binary classification, inputs of equal scale",
    ),
    _LINE,
    Problem(
        "digits", "Digits, 5-way 5-shot", True, _DIGITS,
        inputs=64, outputs=5, shots=5, queries=5, steps=5, rates=_doubling(0.1),
        exams=(("seen", "digits of training, new tasks"), ("unseen", "digits never seen")),
        iterations=300, meta_lr=0.003, validation_tasks=100, test_tasks=200,
    ),
)  # fmt: skip


def quick(problem: Problem) -> Problem:
    """The same in seconds, for tests; too short for any number to mean anything.

    Returns:
        The problem, with few iterations, rates and tasks.
    """
    return replace(
        problem,
        iterations=QUICK_ITERATIONS,
        rates=problem.rates[2:4],
        validation_tasks=8,
        test_tasks=12,
    )


def sampler(problem: Problem, split: str, seed: int, exam: str = "") -> Sampler:
    """Draws tasks; each split has a stream of its own.

    Args:
        problem: Of which.
        split: One of ``SPLITS``.
        seed: Of the whole run.
        exam: For validation and test, which of the problem's exams.

    Returns:
        A function from the number of tasks to tasks with inputs ``[T, S, inputs]``.
    """
    own = 3 * seed + SPLITS.index(split)
    tasks = _digits(problem, split, own, exam) if problem.name == "digits" else _toy(problem, own)
    scales = _scales(problem)

    def sample(count: int) -> Episodes:
        x_s, y_s, x_q, y_q = tasks.sample(count)
        return Episodes(x_s.flatten(2) * scales, y_s, x_q.flatten(2) * scales, y_q)

    return sample


def _toy(problem: Problem, seed: int) -> TaskDistribution:
    points, inputs = (problem.shots, problem.queries), problem.inputs
    if problem.accuracy:
        return BinaryClassificationTasks(*points, inputs=inputs, seed=seed)
    return LinearRegressionTasks(*points, inputs=inputs, bias=False, seed=seed)


def _digits(problem: Problem, split: str, seed: int, exam: str) -> TaskDistribution:
    seen = split == "train" or exam == "seen"
    part = "train" if seen else {"validation": "valid", "test": "test"}[split]
    queries = problem.queries if split == "train" else 15
    return DigitTasks(part, problem.outputs, problem.shots, queries, seed=seed)


def _scales(problem: Problem) -> Tensor:
    """What inputs are multiplied by; their mean square is 1."""
    if not problem.scales:
        return torch.ones(problem.inputs)
    scales = torch.logspace(0, -math.log10(LARGEST_OVER_SMALLEST), problem.inputs)
    return scales / scales.square().mean().sqrt()


def learner_of(problem: Problem, kind: str, lr: float, seed: int) -> MAML | GBML:
    """Builds a method's learner; the seed alone decides its weights.

    Args:
        problem: Whose model.
        kind: "shallow": one linear layer. "linnet": a product of two, of full width, as
            `nn.Linear` draws them. "kfo": one linear layer, with a KroneckerTransform. "mlp": as
            linnet, with a ReLU between.
        lr: Inner learning rate.
        seed: Of the weights.

    Returns:
        The learner.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # y = W x has no bias, nor have its models; a classifier has one.
        model: nn.Module = nn.Linear(problem.inputs, problem.outputs, bias=problem.accuracy)
        if kind in ("linnet", "mlp"):
            model = split_linear(model, "", DEPTH, init="default")
    if kind == "mlp":
        first, second = model.children()
        model = nn.Sequential(first, nn.ReLU(), second)
    if kind == "kfo":
        return GBML(model, transform=KroneckerTransform(KroneckerLinear), lr=lr)
    return MAML(model, lr=lr)
