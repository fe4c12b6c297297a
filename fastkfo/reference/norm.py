"""Batch normalisation on batch statistics, for T tasks at once."""

from __future__ import annotations

import torch
from torch import Tensor


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y = (x − mean) / √(var + eps) · weight + bias`, statistics per task and channel.

    Args:
        x: `[T, N, C, ...]`.
        weight: `[T, C]`, `[C]`, or None for one.
        bias: `[T, C]`, `[C]`, or None for zero.
        eps: is added to the variance.

    Returns:
        y of x's shape, and the mean and the biased variance, `[T, C]`.
    """
    dims = (1, *range(3, x.dim()))
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    y = normalise(x, mean, var, weight, bias, eps)
    return y, mean.flatten(1), var.flatten(1)


def normalise(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The same with statistics that are given, `[T, C]`, `[C]`, or of x's rank."""
    mean, var = per_channel(mean, x), per_channel(var, x)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * per_channel(weight, x)
    centred = x - mean
    return centred * scale if bias is None else torch.addcmul(per_channel(bias, x), centred, scale)


def per_channel(value: Tensor, x: Tensor) -> Tensor:
    """`[T, C]` or `[C]`, to be broadcast with x `[T, N, C, ...]`."""
    if value.dim() == x.dim():
        return value
    tasks = value.shape[0] if value.dim() == 2 else 1
    return value.reshape(tasks, 1, -1, *[1] * (x.dim() - 3))
