"""Choosing a task's samples class by class, without going through all samples.

A task's samples are chosen from pools, one per label: its samples that are left. As a list, they
would be described one by one; 100,000 of them, for each task, to keep 25.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

from fastkfo.data.descriptions import DataDescription, TaskDescription

__all__ = ["Pools", "describe", "whole"]


class Pools(NamedTuple):
    """The samples that are left, by label.

    Attributes:
        of: A list per label: indices, or descriptions. Labels are in the order in which they first
            occur in the task.
        grouped: Whether the task's samples are in the order of the pools. If not, they are in the
            order of their indices.
    """

    of: dict[Any, list[Any]]
    grouped: bool


def describe(pools: Pools) -> TaskDescription:
    """Describe what is left, in the task's order."""
    indices = chain.from_iterable(pools.of.values())
    return [DataDescription(i) for i in (indices if pools.grouped else sorted(indices))]


def whole(dataset: Any) -> Pools:
    """All samples of a `MetaDataset`, which nobody may change."""
    indices = [(label, sorted(of)) for label, of in dataset.labels_to_indices.items() if of]
    indices.sort(key=_first)
    return Pools(dict(indices), grouped=False)


def _first(entry: tuple[Any, list[int]]) -> int:
    return entry[1][0]
