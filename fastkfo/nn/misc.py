"""Small modules and switches: Lambda, Flatten, Scale, freeze, unfreeze.

Source: the interface is learn2learn 0.2.0's `nn.misc` (https://github.com/learnables/learn2learn).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Flatten", "Lambda", "Scale", "freeze", "unfreeze"]

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


class Lambda(nn.Module):
    """Module that calls a function.

    Args:
        lmb: The function; it gets the arguments of the call.

    Raises:
        TypeError: If `lmb` is not callable.
    """

    def __init__(self, lmb: Callable[..., Any]) -> None:
        super().__init__()
        if not callable(lmb):
            raise TypeError(f"lmb: expected a callable, got {type(lmb).__name__}")
        self.lmb = lmb

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.lmb(*args, **kwargs)


class Flatten(nn.Module):
    """Module that flattens `[B, ...]` to `[B, -1]`, for any strides and also for B = 0."""

    def forward(self, x: Tensor) -> Tensor:
        """Flatten all dimensions but the first.

        Args:
            x: `[B, ...]`, any dtype.

        Returns:
            A tensor `[B, P]`, P the product of the other sizes; a view where possible.

        Raises:
            ValueError: If `x` has no dimension.
        """
        if x.dim() == 0:
            raise ValueError("x: expected at least one dimension, got shape ()")
        return x.reshape(x.size(0), math.prod(x.shape[1:]))


class Scale(nn.Module):
    """Elementwise product with a learned tensor: y = α x.

    Args:
        shape: Shape of α, an int or a sequence of them; None for (1,).
        alpha: Initial value of every element.

    Attributes:
        alpha: α, a parameter of PyTorch's default dtype.

    Raises:
        TypeError: If `shape` is neither None, an int nor a sequence.
    """

    def __init__(self, shape: int | Sequence[int] | None = None, alpha: float = 1.0) -> None:
        super().__init__()
        if shape is None:
            shape = (1,)
        elif isinstance(shape, int):
            shape = (shape,)
        elif not isinstance(shape, Sequence):
            raise TypeError(
                f"shape: expected None, an int or a sequence of ints, got {type(shape).__name__}"
            )
        self.alpha = nn.Parameter(torch.ones(tuple(shape)) * alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Scale.

        Args:
            x: Any shape that broadcasts with α.

        Returns:
            α x.
        """
        return x * self.alpha


def _check_module(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")


def freeze(module: _ModuleT) -> _ModuleT:
    """Let no parameter of a module require a gradient; in place.

    Args:
        module: The module. Parameters inside a graph (a clone's) are detached.

    Returns:
        The module itself.

    Raises:
        TypeError: If `module` is no module.
    """
    _check_module(module)
    for p in module.parameters():
        p.detach_().requires_grad_(False)
    return module


def unfreeze(module: _ModuleT) -> _ModuleT:
    """Let every parameter of a module require a gradient; in place.

    Args:
        module: The module.

    Returns:
        The module itself.

    Raises:
        TypeError: If `module` is no module.
    """
    _check_module(module)
    for p in module.parameters():
        p.requires_grad_(True)
    return module
