"""Gradients clipped by value or by norm, differentiably, task by task."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastkfo.optim.inner.checks import number
from fastkfo.optim.inner.moments import root

EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm

Grads = Sequence["Tensor | None"]


def clip_by_value(grads: Grads, most: float) -> list[Tensor | None]:
    """Every number cut off at ±most; where it was, its derivative is 0."""
    return [None if g is None else g.clamp(-most, most) for g in grads]


def clip_by_norm(grads: Grads, most: float, tasks: int | None) -> list[Tensor | None]:
    """`g · min(1, most / (‖g‖ + 1e-6))`, with the norm over all parameters of one task.

    Args:
        grads: one gradient or None per parameter.
        most: the largest norm.
        tasks: T, if they are `[T, ...]`; None for one task.

    Returns:
        The clipped gradients; differentiable, the norm included.
    """
    squares = [_square(g, tasks) for g in grads if g is not None]
    if not squares:
        return list(grads)
    home = squares[0].device
    total = squares[0]
    for square in squares[1:]:
        total = total + square.to(home)
    scale = (most / (root(total) + EPS)).clamp(max=1.0)
    return [None if g is None else g * _fitted(scale, g) for g in grads]


def _square(g: Tensor, tasks: int | None) -> Tensor:
    """`‖g‖²`, a number or `[T]`."""
    square = g.square()
    return square.sum() if tasks is None else square.reshape(tasks, -1).sum(1)


def _fitted(scale: Tensor, g: Tensor) -> Tensor:
    """A number, or `[T]` in front of a gradient's own axes, in its dtype and on its device."""
    scale = scale.to(g.device, g.dtype)
    return scale if scale.dim() == 0 else scale.reshape(-1, *[1] * (g.dim() - 1))


def check_clip(name: str, value: object) -> None:
    """Raise unless `value` is None or a positive number."""
    if value is None:
        return
    if number(name, value) <= 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")
