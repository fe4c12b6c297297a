"""RMSProp, differentiable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastkfo.optim.inner.checks import within
from fastkfo.optim.inner.moments import moving_average, root
from fastkfo.optim.inner.optimizer import Buffers, InnerOptimizer


@dataclass(frozen=True)
class RMSProp(InnerOptimizer):
    """`v ← α v + (1 − α) u²`; the direction is `d = u / (√v + ε)` or, with momentum, `b ← μ b + d`.

    As in `torch.optim.RMSprop`, not centred. Where v is 0, which means that every gradient was, the
    derivative of `√v` is taken as 0: that of d itself, 1/ε, is then exact.

    Args:
        alpha: α, in [0, 1).
        eps: ε, at least 0; with 0, a gradient of 0 gives NaN.
        momentum: μ, at least 0.

    Raises:
        TypeError: an argument is no number.
        ValueError: one is out of range.

    Source: Tieleman, Hinton, "Lecture 6.5: RMSProp", Coursera 2012.
    """

    real: ClassVar[bool] = True  # of a complex number it would take u² for |u|²

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0

    def __post_init__(self) -> None:
        within("alpha", self.alpha, least=0, below=1)
        within("eps", self.eps, least=0)
        within("momentum", self.momentum, least=0)

    def direction(self, update: Tensor, buffers: Buffers, count: int) -> tuple[Tensor, Buffers]:
        """See `InnerOptimizer`."""
        second = moving_average(buffers[0] if count else None, update * update, self.alpha)
        direction = update / (root(second) + self.eps)
        if self.momentum == 0:
            return direction, (second,)
        moving = direction + self.momentum * buffers[1] if count else direction
        return moving, (second, moving)
