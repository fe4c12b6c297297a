"""Convolutions of T tasks, each with weights of its own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """One convolution whose groups are the tasks'.

    Args:
        x: `[T, N, C, H, W]`.
        weight: `[T, O, C / groups, kh, kw]`.
        bias: `[T, O]` or None.
        stride: of the window, down and across.
        padding: zeros on either side.
        dilation: between the taps.
        groups: of channels.

    Returns:
        `[T, N, O, H', W']`.
    """
    tasks, samples = x.shape[:2]
    if tasks == 0 or samples == 0:  # PyTorch refuses no groups, and has no derivative of no samples
        return _of_nothing(x, weight, bias, stride, padding, dilation)
    images = x.transpose(0, 1).flatten(1, 2)  # [N, T C, H, W]
    y = F.conv2d(
        images,
        weight.flatten(0, 1),
        None if bias is None else bias.flatten(),
        stride,
        padding,
        dilation,
        tasks * groups,
    )
    return y.reshape(samples, tasks, -1, *y.shape[2:]).transpose(0, 1)


def _of_nothing(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """An empty result that depends on all operands."""
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            x.shape[3:], weight.shape[3:], stride, padding, dilation, strict=True
        )
    ]
    zero = x.sum() + weight.sum() * 0 + (0 if bias is None else bias.sum() * 0)
    return zero.expand(*x.shape[:2], weight.shape[1], *sizes)
