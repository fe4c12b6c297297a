"""Disjoint sets of classes for training, validation and test."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastkfo.tasks import checks

__all__ = ["split_classes"]


def split_classes(
    labels: Tensor | Iterable[Hashable], sizes: Sequence[float], seed: int = 0
) -> list[tuple[Any, ...]]:
    """Splits classes at random into disjoint sets.

    Args:
        labels: Labels or classes, in any order, repeated or not: integers, a tensor or an array of
            them, or names.
        sizes: Of each set: counts (all int), or fractions of the classes (all float; the set
            boundaries are rounded). What is left over is in no set.
        seed: Seeds a generator of its own; the global one is left alone.

    Returns:
        One tuple of classes per size, each in sorted order. The same classes, sizes and seed give
        the same sets, whatever the order of the labels.

    Raises:
        TypeError: If sizes are neither all int nor all float, seed is no integer, or classes
            cannot be sorted.
        ValueError: If a size is not positive, or a set would be empty, or there are fewer classes
            than the sizes ask for, or seed is negative or 2**63 or more.

    Example:
        >>> train, valid, test = split_classes(range(100), (64, 16, 20), seed=0)
        >>> few = FewShotTasks(images, labels, 5, 1, 15, classes=train)
    """
    checks.seed("seed", seed)
    values: Any = labels.tolist() if hasattr(labels, "tolist") else labels
    try:
        classes = sorted(set(values))
    except TypeError as error:
        raise TypeError(f"labels: expected integers or names, got {error}") from error
    bounds = _bounds(tuple(sizes), len(classes))
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed)).tolist()
    return [tuple(sorted(classes[i] for i in order[begin:end])) for begin, end in pairwise(bounds)]


def _bounds(sizes: tuple[float, ...], classes: int) -> list[int]:
    """Where each set begins in a random order, and the last one ends."""
    counts = all(isinstance(s, int) and not isinstance(s, bool) for s in sizes)
    if not sizes or not (counts or all(isinstance(s, float) for s in sizes)):
        raise TypeError(f"sizes: expected counts (int) or fractions (float), got {sizes}")
    if not all(s > 0 for s in sizes):
        raise ValueError(f"sizes: expected positive numbers, got {sizes}")
    sums = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    limit = classes if counts else 1 + 1e-9
    if not sums[-1] <= limit:
        unit = f"{classes}, the number of classes," if counts else "1"
        raise ValueError(f"sizes: expected at most {unit} in sum, got {sums[-1]}")
    bounds = [int(s) if counts else round(s * classes) for s in sums]
    for size, (begin, end) in zip(sizes, pairwise(bounds), strict=True):
        if begin == end:
            raise ValueError(f"sizes: expected at least one of {classes} classes, got {size}")
    return bounds
