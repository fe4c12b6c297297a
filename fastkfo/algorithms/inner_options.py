"""What learners have in common of inner optimizers, clipping and learning rates per step."""

from __future__ import annotations

from typing import Any

from fastkfo.optim.inner import START, InnerOptimizer, OptimizerState, PerStepLR
from fastkfo.optim.inner.update import InnerUpdate, inner_update


class InnerOptions:
    """The options, and the state that goes from one `adapt` to the next."""

    lr: Any
    inner_optimizer: InnerOptimizer | None = None
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    _inner_state: OptimizerState = START

    def _inner_options(self) -> dict[str, Any]:
        """What a clone takes over."""
        return {
            "inner_optimizer": self.inner_optimizer,
            "clip_grad_norm": self.clip_grad_norm,
            "clip_grad_value": self.clip_grad_value,
            "_inner_state": self._inner_state,
        }

    def _inner_update(self) -> InnerUpdate:
        """What is done with gradients."""
        return inner_update(self.inner_optimizer, self.clip_grad_norm, self.clip_grad_value)

    def _rate(self) -> Any:
        """The rate or rates of the step to come; ValueError if there is none for it."""
        lr = self.lr
        return lr.at(self._inner_state.step) if isinstance(lr, PerStepLR) else lr
