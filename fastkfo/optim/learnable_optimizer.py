"""An optimizer with learnable transforms, for online (one-step) meta-descent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastkfo.functional.checks import finite
from fastkfo.optim.fused import updated_parameters
from fastkfo.utils import ParameterSlots, check_not_compiled


class LearnableOptimizer(nn.Module):
    """Steps a model by `p ← p − lr · transform(p.grad)`, differentiably in the transforms.

    Each step cuts the graph of the parameters, so that the next loss's backward pass reaches the
    transforms through one update.

    Args:
        model: the model to optimize. It is kept in `.info["model"]`, not as a submodule, so
            `.to()` does not move it.
        transform: called with each parameter; returns a module, or None for the plain gradient.
        lr: the learning rate.

    Raises:
        TypeError: `model` is no module or is compiled, or `lr` no number.
        ValueError: `lr` is not finite, or `transform` returned neither a module nor None.

    The state dict's keys are `transforms.{i}.*`, where i counts all parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        transform: Callable[[Tensor], nn.Module | None],
        lr: float | Tensor = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        check_not_compiled(model, "model")
        finite("lr", lr)
        self.info: dict[str, Any] = {"model": model}
        transforms = [transform(p) for p in model.parameters()]
        for i, made in enumerate(transforms):
            if made is not None and not isinstance(made, nn.Module):
                raise ValueError(
                    f"transform: expected a Module or None for parameter {i}, "
                    f"got {type(made).__name__}"
                )
        self.transforms = nn.ModuleList(transforms)  # type: ignore[arg-type]
        self.lr = lr

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the model's parameters that have a gradient.

        Args:
            closure: called first, if given, to compute the loss and the gradients.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError: a transform returned no tensor, or dtypes do not match.
            ValueError: a transform returned the wrong shape; the model is as it was.
        """
        loss = closure() if closure is not None else None
        slots = ParameterSlots(self.info["model"])
        params = [p.detach() for p in slots.params]
        grads = [None if (g := _grad(p)) is None else g.detach() for p in slots.params]
        transforms = list(self.transforms._modules.values())
        new = updated_parameters(transforms, params, grads, self.lr)
        for p, grad in zip(new, grads, strict=True):
            if grad is None:
                continue
            if p.requires_grad:
                p.retain_grad()
            else:
                p.requires_grad_()  # nothing to learn in its transform: a leaf again
        slots.put(
            [old if g is None else p for old, p, g in zip(slots.params, new, grads, strict=True)]
        )
        return loss

    def zero_grad(self) -> None:  # type: ignore[override]
        """Set the gradients of the model's parameters to new zeros; the old ones stay in graphs."""
        for p in self.info["model"].parameters():
            if _grad(p) is not None:
                p.grad = torch.zeros_like(p.detach())


def _grad(p: Tensor) -> Tensor | None:
    with warnings.catch_warnings():  # asking a non-leaf tensor for .grad warns
        warnings.simplefilter("ignore")
        return p.grad
