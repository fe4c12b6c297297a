"""Gradient descent with momentum, differentiable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastkfo.optim.inner.checks import number, within
from fastkfo.optim.inner.optimizer import Buffers, InnerOptimizer


@dataclass(frozen=True)
class SGD(InnerOptimizer):
    """`b ← μ b + (1 − δ) u`; the direction is b or, with nesterov, `u + μ b`.

    The first b is u, whatever δ, as in `torch.optim.SGD`. Without momentum the direction is u.

    Args:
        momentum: μ, at least 0.
        nesterov: whether the direction looks ahead.
        dampening: δ.

    Raises:
        TypeError: an argument is no number, or `nesterov` no bool.
        ValueError: one is not finite, `momentum` is negative, or `nesterov` is set without momentum
            or with dampening.

    Example:
        >>> maml = fastkfo.algorithms.MAML(model, lr=0.1, inner_optimizer=SGD(momentum=0.9))
    """

    momentum: float = 0.0
    nesterov: bool = False
    dampening: float = 0.0

    def __post_init__(self) -> None:
        within("momentum", self.momentum, least=0)
        number("dampening", self.dampening)
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"nesterov: expected a bool, got {type(self.nesterov).__name__}")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                "nesterov: expected False without momentum or with dampening, got True with "
                f"momentum={self.momentum}, dampening={self.dampening}"
            )

    def direction(self, update: Tensor, buffers: Buffers, count: int) -> tuple[Tensor, Buffers]:
        """See `InnerOptimizer`."""
        if self.momentum == 0:
            return update, ()
        moving = update
        if count:
            moving = torch.add(self.momentum * buffers[0], update, alpha=1 - self.dampening)
        ahead = torch.add(update, moving, alpha=self.momentum) if self.nesterov else moving
        return ahead, (moving,)
