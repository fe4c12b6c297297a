"""Gradients clipped by value or by norm, differentiably, task by task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkfo.optim.inner.checks import number, refuse_complex
from fastkfo.optim.inner.moments import root

EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm

Grads = Sequence["Tensor | None"]


def clip_by_value(grads: Grads, most: float) -> list[Tensor | None]:
    """Every number cut off at ±most; where it was, its derivative is 0. An infinity stays one."""
    # Cut off, an infinity would let a task that has failed take part.
    refuse_complex("clip_grad_value", grads)
    return [None if g is None else torch.where(g.isinf(), g, g.clamp(-most, most)) for g in grads]


def clip_by_norm(grads: Grads, most: float, tasks: int | None) -> list[Tensor | None]:
    """`g · min(1, most / (‖g‖ + 1e-6))`, with the norm over all parameters of one task.

    Args:
        grads: one gradient or None per parameter.
        most: the largest norm.
        tasks: T, if they are `[T, ...]`; None for one task.

    Returns:
        The clipped gradients; differentiable, the norm included. In half precision the norm and
        the products are computed in float32.
    """
    refuse_complex("clip_grad_norm", grads)
    squares = [_square(g, tasks) for g in grads if g is not None]
    if not squares:
        return list(grads)
    home = squares[0].device
    total = squares[0]
    for square in squares[1:]:
        total = total + square.to(home)
    scale = (most / (root(total) + EPS)).clamp(max=1.0)
    return [None if g is None else _scaled(g, scale) for g in grads]


def _square(g: Tensor, tasks: int | None) -> Tensor:
    """`‖g‖²`, a number or `[T]`."""
    square = _wide(g).square()
    return square.sum() if tasks is None else square.reshape(tasks, -1).sum(1)


def _scaled(g: Tensor, scale: Tensor) -> Tensor:
    """A gradient times a number, or times one for each of T rows; in its dtype."""
    wide = _wide(g)
    scale = scale.to(wide.device, wide.dtype)
    if scale.dim():
        scale = scale.reshape(-1, *[1] * (g.dim() - 1))
    return (wide * scale).to(g.dtype)


def _wide(g: Tensor) -> Tensor:
    """Half precision as float32, in which squares of its numbers neither overflow nor vanish."""
    return g.float() if g.dtype in (torch.float16, torch.bfloat16) else g


def check_clip(name: str, value: object) -> None:
    """Raise unless `value` is None or a positive number."""
    if value is None:
        return
    if number(name, value) <= 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")
