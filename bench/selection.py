"""Which problems a run takes on, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.problem import Problem, known
from bench.workloads import METHODS, WORKLOADS

# Five minutes on two cores, JAX included: three kinds of learner, each bound by something else.
QUICK = (
    ("sine-mlp", "kfo"),
    ("anil-head", "kfo"),
    ("anil-head", "maml"),
    ("omniglot-cnn", "kfo"),
)
README = "readme"  # the record that the README quotes: three runs of these
QUOTED = (
    *(("sine-mlp", method) for method in ("maml", "kfo", "kfo-adapt")),
    *(("anil-head", method) for method in ("maml", "kfo", "kfo-adapt")),
    ("omniglot-cnn", "kfo"),
    ("cifarfs-cnn-2", "kfo"),
)


def quick(**sizes: Any) -> list[Problem]:
    """What `make bench` reads."""
    return [Problem.named(workload, method, **sizes) for workload, method in QUICK]


def quoted(**sizes: Any) -> list[Problem]:
    """What the README's table is made from."""
    return [Problem.named(workload, method, **sizes) for workload, method in QUOTED]


def chosen(workloads: Sequence[str], methods: Sequence[str], **sizes: Any) -> list[Problem]:
    """Every workload with every method; none given means all.

    Raises:
        ValueError: One of them is unknown; the message lists the known ones.
    """
    for name in workloads:
        known("workload", name, WORKLOADS)
    for name in methods:
        known("method", name, METHODS)
    return [
        Problem.named(workload, method, **sizes)
        for workload in workloads or WORKLOADS
        for method in methods or METHODS
    ]
