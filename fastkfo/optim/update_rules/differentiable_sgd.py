"""Gradient descent that can be differentiated through."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastkfo.functional.checks import finite
from fastkfo.optim.differentiate import own_gradients
from fastkfo.optim.fused import updated_parameters
from fastkfo.utils import ParameterSlots


class DifferentiableSGD(nn.Module):
    """`p ← p − lr · g` for every parameter of a module, in one fused call.

    Args:
        lr: the learning rate; a number or a tensor. A Parameter is registered under the key `lr`.

    Raises:
        TypeError: `lr` is neither a number nor a floating-point tensor.
        ValueError: `lr` is not finite.
    """

    def __init__(self, lr: float | Tensor) -> None:
        super().__init__()
        finite("lr", lr)
        self.lr = lr

    def forward(self, module: nn.Module, gradients: Sequence[Tensor | None] | None = None) -> None:
        """Exchange the parameters of a module for updated ones, differentiably.

        Args:
            module: the module to update; its old parameters are not written to.
            gradients: one tensor of its parameter's shape, or None, per parameter. By default the
                parameters' `.grad`.

        Raises:
            TypeError: dtypes do not match.
            ValueError: the number of gradients or a shape is wrong; the module is as it was.
        """
        slots = ParameterSlots(module)
        grads = own_gradients(slots.params) if gradients is None else list(gradients)
        slots.put(updated_parameters(None, slots.params, grads, self.lr))
