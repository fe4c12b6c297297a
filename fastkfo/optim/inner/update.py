"""What a learner does with gradients beside its transform: clip, and make directions of them."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastkfo.functional.checks import finite
from fastkfo.optim.clone_cache import GramCache
from fastkfo.optim.fused import transform_gradients, updated_parameters
from fastkfo.optim.inner.checks import refuse_complex
from fastkfo.optim.inner.clipping import check_clip, clip_by_norm, clip_by_value
from fastkfo.optim.inner.given import check_optimizer
from fastkfo.optim.inner.optimizer import InnerOptimizer, OptimizerState
from fastkfo.optim.inner.per_step_lr import PerStepLR
from fastkfo.optim.inner.sgd import SGD

Grads = Sequence["Tensor | None"]


class InnerUpdate(NamedTuple):
    """The step from gradients g to `θ − lr · direction(U(clip(g)))`.

    Attributes:
        optimizer: makes the directions; None: the update is the direction.
        clip_norm: the largest norm of one task's gradients, or None.
        clip_value: the largest absolute value of a gradient's numbers, or None.
    """

    optimizer: InnerOptimizer | None = None
    clip_norm: float | None = None
    clip_value: float | None = None

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped."""
        return self.clip_norm is not None or self.clip_value is not None

    def check_module(self, module: nn.Module) -> None:
        """Raise TypeError where a module has complex parameters, which steps are not for."""
        given = {
            "inner_optimizer": self.optimizer is not None and self.optimizer.real,
            "clip_grad_norm": self.clip_norm is not None,
            "clip_grad_value": self.clip_value is not None,
        }
        for name in (n for n, asked in given.items() if asked):
            refuse_complex(name, module.parameters())

    def clipped(self, grads: Grads, tasks: int | None = None) -> Grads:
        """The gradients as the transform gets them.

        Args:
            grads: one or None per parameter.
            tasks: T, if they are `[T, ...]`; None for one task.

        Returns:
            The clipped ones.
        """
        if self.clip_value is not None:
            return clip_by_value(grads, self.clip_value)
        if self.clip_norm is not None:
            return clip_by_norm(grads, self.clip_norm, tasks)
        return grads

    def at_once(self, transforms: Any, lr: Any) -> bool:
        """Whether transform and step are one call: no optimizer is between them."""
        return self.optimizer is None and (transforms is None or not isinstance(lr, (list, tuple)))

    def directions(self, updates: Grads, state: OptimizerState) -> tuple[Grads, OptimizerState]:
        """What the learning rate multiplies, and the state after the step."""
        if self.optimizer is None:
            return updates, state.next()
        return self.optimizer.directions(updates, state)

    def step(
        self,
        transforms: Sequence[nn.Module | None] | None,
        params: Sequence[Tensor],
        grads: Grads,
        lr: Any,
        state: OptimizerState,
        cache: GramCache | None = None,
    ) -> tuple[list[Tensor], OptimizerState]:
        """The step of one task.

        Args:
            transforms: one module or None per parameter, or None for plain gradients.
            params: θ.
            grads: g; None leaves a parameter as it is.
            lr: the rate or rates of this step, as for `updated_parameters`.
            state: before the step.
            cache: squares of factors to be used again.

        Returns:
            θ and the state after the step.
        """
        grads = self.clipped(grads)
        if self.at_once(transforms, lr):
            return updated_parameters(transforms, params, grads, lr, cache), state.next()
        if transforms is not None:
            grads = transform_gradients(transforms, grads, cache)
        found, state = self.directions(grads, state)
        return updated_parameters(None, params, found, lr), state


def inner_update(optimizer: object, clip_norm: object, clip_value: object) -> InnerUpdate:
    """The options of a learner, checked.

    Args:
        optimizer: `inner_optimizer` of the learner.
        clip_norm: `clip_grad_norm` of it.
        clip_value: `clip_grad_value` of it.

    Returns:
        What they say. SGD without momentum is no optimizer at all.

    Raises:
        TypeError: one is of the wrong type.
        ValueError: a value to clip at is not positive, or there are two.
    """
    check_optimizer("inner_optimizer", optimizer)
    check_clip("clip_grad_norm", clip_norm)
    check_clip("clip_grad_value", clip_value)
    if clip_norm is not None and clip_value is not None:
        raise ValueError(
            f"clip_grad_value: expected None with clip_grad_norm={clip_norm}, got {clip_value}"
        )
    if type(optimizer) is SGD and optimizer.momentum == 0:
        optimizer = None
    return InnerUpdate(optimizer, clip_norm, clip_value)  # type: ignore[arg-type]


def check_lr(lr: object, module: nn.Module) -> None:
    """Raise unless `lr` is a number, a tensor, or a PerStepLR made for such a module."""
    if not isinstance(lr, PerStepLR):
        if type(lr) is bool or not isinstance(lr, (Tensor, Real)):
            given = type(lr).__name__
            raise TypeError(f"lr: expected a number, a tensor or a PerStepLR, got {given}")
        return finite("lr", lr)
    lr.check_count(len(list(module.parameters())))


def check_adaptable(lr: object, adapt_transform: bool) -> None:
    """Raise ValueError where transforms take steps, too, and there is no rate for these."""
    if adapt_transform and isinstance(lr, PerStepLR) and not lr.shared:
        raise ValueError(
            "adapt_transform: expected False with a PerStepLR of one rate per parameter, which has "
            "none for the transform's own parameters (shared=True has), got True"
        )
