"""What an inner loop is called with: checked, and in groups of tasks of equal shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from fastkfo.inner_loop.trees import map_tensors, stack


class Batch(NamedTuple):
    """T tasks of equal shapes; any pytrees of tensors `[T, S, ...]`.

    Attributes:
        x_s: support inputs.
        y_s: support targets.
        x_q: query inputs, or None.
        y_q: query targets, or None.
    """

    x_s: Any
    y_s: Any
    x_q: Any = None
    y_q: Any = None

    def rows(self, begin: int, end: int) -> Batch:
        """Some of the tasks."""
        return self.map(lambda x: x[begin:end])

    def map(self, function: Callable[[Tensor], Any]) -> Batch:
        """The same of every tensor."""
        return Batch(*map_tensors(function, tuple(self)))

    def normal(self) -> Batch:
        """Copies of tensors of inference mode: these have no place in a graph of autograd's."""
        return self.map(lambda x: x.clone() if x.is_inference() else x)

    def tensors(self) -> list[Tensor]:
        """All of its tensors."""
        return [x for x in tree_leaves(tuple(self)) if isinstance(x, Tensor)]


def is_one_batch(batch: Batch) -> bool:
    """Whether all tensors have one and the same T, at least 1, and none is of inference mode."""
    tensors = [x for x in batch if x is not None]
    tasks = tensors[0].shape[0]
    return tasks > 0 and all([x.shape[0] == tasks and not x.is_inference() for x in tensors])


def check_given(batch: Batch) -> None:
    """Raise TypeError where support targets are missing, or lists and tensors are mixed."""
    if batch.y_s is None:
        raise TypeError("y_s: expected support targets [T, S, ...], got NoneType")
    if not isinstance(batch.x_s, list):
        for name, tree in batch._asdict().items():
            if isinstance(tree, list):
                got = type(batch.x_s).__name__
                raise TypeError(f"{name}: expected no list where x_s is a {got}, got a list")


def check_batch(batch: Batch) -> int:
    """The number of tasks of a batch.

    Args:
        batch: the batch.

    Returns:
        T, the number of tasks.

    Raises:
        TypeError: something is no tensor.
        ValueError: a tensor lacks the axes, is empty, or has another number of tasks.
    """
    tasks, of = None, ""
    for name, tree in batch._asdict().items():
        if tree is None:
            continue
        leaves = tree_flatten(tree)[0]
        if not leaves:
            raise ValueError(f"{name}: expected tensors, got an empty {type(tree).__name__}")
        for x in leaves:
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: expected a tensor [T, S, ...], got {type(x).__name__}")
            if x.dim() < 2:
                raise ValueError(f"{name}: expected a shape [T, S, ...], got {list(x.shape)}")
            if x.numel() == 0:
                raise ValueError(
                    f"{name}: expected at least one task with at least one sample, "
                    f"got shape {list(x.shape)}"
                )
            if tasks is None:
                tasks, of = x.shape[0], name
            elif x.shape[0] != tasks:
                raise ValueError(f"{name}: expected {tasks} tasks as in {of}, got {x.shape[0]}")
    if tasks is None:
        raise TypeError("x_s: expected a tensor [T, S, ...], got NoneType")
    return tasks


class Group(NamedTuple):
    """Tasks of equal shapes, and where they were in the list."""

    indices: list[int]
    batch: Batch


def grouped(given: Batch) -> list[Group]:
    """Group lists of tasks by shape, in the order of first appearance.

    Args:
        given: lists, one entry per task without a task axis; or None.

    Returns:
        The groups.

    Raises:
        TypeError: some are lists and some are not.
        ValueError: the lists are empty or not equally long.
    """
    present = {name: x for name, x in given._asdict().items() if x is not None}
    for name, x in present.items():
        if not isinstance(x, list):
            raise TypeError(f"{name}: expected a list of tasks as in x_s, got {type(x).__name__}")
        if len(x) != len(given.x_s) or not x:
            raise ValueError(
                f"{name}: expected a list of {len(given.x_s)} tasks as in x_s, at least one, "
                f"got {len(x)}"
            )
    for name, x in present.items():
        for t, entry in enumerate(x):
            if entry is None:
                raise TypeError(f"{name}: expected a tensor [S, ...] for task {t}, got NoneType")
    groups: dict[Any, list[int]] = {}
    for t in range(len(given.x_s)):
        groups.setdefault(_signature([x[t] for x in present.values()]), []).append(t)
    return [
        Group(
            indices,
            Batch(*[None if x is None else stack([x[t] for t in indices]) for x in tuple(given)]),
        )
        for indices in groups.values()
    ]


def _signature(trees: Sequence[Any]) -> Any:
    leaves, spec = tree_flatten(trees)
    return (
        str(spec),
        *[(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else type(x) for x in leaves],
    )


def joined(first: Any, second: Any) -> Any:
    """Support and query inputs of each task, one behind the other: `[T, S + Q, ...]`."""
    return map_tensors(lambda a, b: torch.cat([a, b], 1), first, second)


def parted(both: Any, support: Any) -> tuple[Any, Any]:
    """The features of support and query, given those of both and the support inputs."""
    size = tree_flatten(support)[0][0].shape[1]
    return map_tensors(lambda x: x[:, :size], both), map_tensors(lambda x: x[:, size:], both)
