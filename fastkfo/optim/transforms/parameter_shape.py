"""How a parameter of any rank is seen as a stack of matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_parameter(param: object) -> None:
    """Raise TypeError unless `param` is a floating-point tensor."""
    if not isinstance(param, Tensor):
        raise TypeError(f"param: expected a tensor, got {type(param).__name__}")
    if not torch.is_floating_point(param):
        raise TypeError(f"param: expected a floating-point tensor, got {param.dtype}")


def matrix_shape(param: Tensor) -> tuple[int, int]:
    """The n and m of the matrices `[-1, n, m]` that a parameter is made of.

    Args:
        param: a parameter `[]`, `[n]`, `[n, m]` or, of a convolution, `[out, n, *kernel]`.

    Returns:
        `(1, 1)`, `(n, 1)`, `(n, m)` or `(n, prod(kernel))`.
    """
    shape = param.shape
    if len(shape) < 2:
        return (shape[0] if shape else 1), 1
    if len(shape) == 2:
        return shape[0], shape[1]
    return shape[1], math.prod(shape[2:])
