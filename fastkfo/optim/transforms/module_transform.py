"""Any module as a transform of a gradient, through a change of shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastkfo.optim.transforms.parameter_shape import check_parameter


class ReshapedTransform(nn.Module):
    """Reshapes a gradient, applies a module, and restores the shape.

    Args:
        transform: the module, from the new shape to the same shape.
        shape: the new shape; one entry may be -1.
    """

    def __init__(self, transform: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.transform = transform
        self.in_shape = shape

    def forward(self, grad: Tensor) -> Tensor:
        """Transform a gradient of any strides.

        Args:
            grad: the gradient.

        Returns:
            The update, in the gradient's shape.

        Raises:
            TypeError: the module returned no tensor.
            ValueError: the module returned a different number of elements.
        """
        update = self.transform(grad.reshape(self.in_shape))
        if not isinstance(update, torch.Tensor):
            raise TypeError(
                f"transform: expected it to return a tensor, got {type(update).__name__}"
            )
        if update.numel() != grad.numel():
            raise ValueError(
                f"transform: expected it to return {grad.numel()} elements, as the gradient of "
                f"shape {list(grad.shape)} has, got shape {list(update.shape)}"
            )
        return update.reshape(grad.shape)


class ModuleTransform:
    """Makes transforms of whole gradients: `module_cls(numel, numel)` on shape `[1, numel]`.

    Args:
        module_cls: called with the number of inputs and outputs, for example `nn.Linear`.
    """

    def __init__(self, module_cls: Callable[[int, int], nn.Module]) -> None:
        self.module_cls = module_cls

    def __call__(self, parameter: Tensor) -> ReshapedTransform:
        """The transform for one parameter, in its dtype and on its device.

        Args:
            parameter: the parameter.

        Returns:
            The transform.

        Raises:
            TypeError: `parameter` is not a floating-point tensor.
        """
        check_parameter(parameter)
        numel = parameter.numel()
        module = self.module_cls(numel, numel).to(parameter.device, parameter.dtype)
        return ReshapedTransform(transform=module, shape=(1, numel))
