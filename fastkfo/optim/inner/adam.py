"""Adam, differentiable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastkfo.optim.inner.checks import within
from fastkfo.optim.inner.moments import moving_average, root
from fastkfo.optim.inner.optimizer import Buffers, InnerOptimizer


@dataclass(frozen=True)
class Adam(InnerOptimizer):
    """`m ← β₁ m + (1 − β₁) u`, `v ← β₂ v + (1 − β₂) u²`; the direction is `m̂ / (√v̂ + ε)`.

    With `m̂ = m / (1 − β₁ⁿ)` and `v̂ = v / (1 − β₂ⁿ)` at a parameter's n-th gradient, as in
    `torch.optim.Adam`. Where v is 0, which means that every gradient was, the derivative of `√v` is
    taken as 0: the derivative of the direction itself is then exact (docs/inner_optimizers.md).

    Args:
        betas: β₁ and β₂, each in [0, 1).
        eps: ε, at least 0; with 0, a gradient of 0 gives NaN.

    Raises:
        TypeError: an argument is no number, or `betas` no pair of numbers.
        ValueError: one is out of range.

    Source: Kingma, Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015.
    """

    real: ClassVar[bool] = True  # of a complex number it would take u² for |u|²

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"betas: expected two numbers, got {self.betas!r}")
        for k, beta in enumerate(self.betas):
            within(f"betas[{k}]", beta, least=0, below=1)
        within("eps", self.eps, least=0)
        object.__setattr__(self, "betas", tuple(self.betas))  # a list could change

    def direction(self, update: Tensor, buffers: Buffers, count: int) -> tuple[Tensor, Buffers]:
        """See `InnerOptimizer`."""
        first, second = buffers or (None, None)
        beta1, beta2 = self.betas
        first = moving_average(first, update, beta1)
        second = moving_average(second, update * update, beta2)
        correction1, correction2 = (1 - beta ** (count + 1) for beta in self.betas)
        scale = root(second) / correction2**0.5 + self.eps
        return first / correction1 / scale, (first, second)
