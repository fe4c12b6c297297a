"""What keeps a NaN or an infinity of one task out of everything that tasks share.

A task's own tensors are rows of `[T, ...]`, and no row reads another. Rows meet where a gradient is
summed over tasks: in the initial parameters, the transform, the rates. There the rows that are not
finite are left out, so that the task they belong to contributes exactly nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import inf, isfinite

import torch
from torch import Tensor


def finite_rows(tensors: Sequence[Tensor | None], tasks: int) -> Tensor | None:
    """Which tasks' rows are finite in all tensors.

    Args:
        tensors: `[T, ...]` each, or None.
        tasks: T, the number of tasks.

    Returns:
        `[T]`, bool. None if all are, where a look costs no synchronisation (the CPU).
    """
    present = [x.detach() for x in tensors if x is not None and x.is_floating_point()]
    if not present:
        return None
    # A sum is the cheapest pass. One that overflows only leads to the second look.
    on_cpu = all([x.device.type == "cpu" for x in present])
    if on_cpu and all([isfinite(x.sum().item()) for x in present]):
        return None
    # A NaN and an infinity both come through a maximum; empty rows have none.
    largest = [_largest(x.reshape(tasks, -1)) for x in present if x.numel()]
    if not largest:
        return None
    if len({x.dtype for x in largest}) > 1:
        largest = [x.double() for x in largest]
    return (largest[0] if len(largest) == 1 else torch.stack(largest).amax(0)) < inf


def _largest(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, inf, 1)


def select_rows(rows: Tensor, x: Tensor, otherwise: float) -> Tensor:
    """The rows of x that are wanted, and a number in place of the others."""
    return torch.where(rows.reshape(-1, *[1] * (x.dim() - 1)), x, _number(otherwise, x))


def _number(value: float, like: Tensor) -> float | Tensor:
    """A number as where takes it: on CUDA a tensor that is kept, or every call would make one."""
    if not like.is_cuda:
        return value
    key = (value != value, like.dtype, like.device)  # 0 or NaN
    if key not in _NUMBERS:
        made = torch.full((), value, dtype=like.dtype, device=like.device)
        if torch.cuda.is_current_stream_capturing():
            return made  # of that graph's memory
        _NUMBERS[key] = made
    return _NUMBERS[key]


_NUMBERS: dict[tuple[bool, torch.dtype, torch.device], Tensor] = {}


def guard(tensors: Sequence[Tensor], tasks: int) -> None:
    """Let only finite rows of the tensors' cotangents pass to what the tensors were made of.

    A hook on the nodes that made them, not on the tensors: the gradients in the tensors themselves,
    which an inner step asks for, are what they are.

    Args:
        tensors: `[T, ...]`.
        tasks: T, the number of tasks.
    """
    if torch.is_grad_enabled():
        for node in {x.grad_fn for x in tensors if x.grad_fn is not None}:
            node.register_prehook(partial(_without_bad_rows, tasks))


def _without_bad_rows(
    tasks: int, cotangents: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...] | None:
    rows = finite_rows(cotangents, tasks)
    if rows is None:
        return None
    return tuple([None if c is None else select_rows(rows, c, 0.0) for c in cotangents])


def spread(tensors: Sequence[Tensor], tasks: int) -> list[Tensor]:
    """Every tensor once per task, `[T, ...]`, without a copy; gradients are summed over tasks."""
    # One node per tensor: autograd would run a common one for every tensor's sake.
    rows = [x.expand(tasks, *x.shape) for x in tensors]
    guard(rows, tasks)
    return rows


class Contained:
    """What enters and leaves a computation with tensors that all tasks share.

    A task that enters with a row that is not finite is computed with zeros and leaves as NaN. With
    zeros, because the gradient of what is shared is a sum of products with what entered.

    Args:
        tasks: T, the number of tasks.
    """

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks
        self.rows: Tensor | None = None

    def enter(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """What to compute with."""
        self.rows = finite_rows(tensors, self.tasks)
        if self.rows is None:
            return list(tensors)
        return [
            x if x is None or not x.is_floating_point() else select_rows(self.rows, x, 0.0)
            for x in tensors
        ]

    def leave(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What to go on with."""
        guard(tensors, self.tasks)
        if self.rows is None:
            return list(tensors)
        return [
            select_rows(self.rows, x, torch.nan) if x.is_floating_point() else x for x in tensors
        ]
