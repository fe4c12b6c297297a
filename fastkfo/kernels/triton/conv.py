"""Task-batched convolution and its adjoints: one kernel each.

Depthwise convolutions (one channel per group) are right, but most of each tile is padding then.
float32 is multiplied as exactly as by plain float32 arithmetic (`launch.precision`) unless
`torch.backends.cudnn` allows TF32 for convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fastkfo.kernels.triton import conv_kernels as kernels
from fastkfo.kernels.triton import launch


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x2: Tensor | None,
    weight2: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`y = conv(x, weight) + conv(x2, weight2) + bias`, every task with its own weights.

    Args:
        x: `[T, N, H, W, C]`.
        weight: `[T, O, C/groups, kh, kw]`, of x's dtype.
        bias: `[T, O]`, or None for zero.
        x2: of x's shape, or None without a second term (a tangent has one).
        weight2: of weight's shape; None where x2 is.
        stride: of rows and of columns.
        padding: zeros on either side of rows and of columns.
        dilation: of rows and of columns.
        groups: divides C and O.

    Returns:
        y, `[T, N, OH, OW, O]`; both terms share one accumulator.
    """
    launch.check(x=x, weight=weight, bias=bias, x2=x2, weight2=weight2)
    launch.check_one_dtype(x=x, weight=weight, bias=bias, x2=x2, weight2=weight2)
    tasks, n, h, w, channels = x.shape
    outputs, depth, kh, kw = weight.shape[1:]
    oh, ow = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip((h, w), (kh, kw), stride, padding, dilation, strict=True)
    )
    y = x.new_empty(tasks, n, oh, ow, outputs)
    if y.numel() == 0:
        return y
    if weight.numel() == 0:
        return y.zero_() if bias is None else y.copy_(bias[:, None, None, None])
    pixels, each = n * oh * ow, outputs // groups
    image = max(h * w * channels, oh * ow * outputs)
    launch.check_sizes(tasks, groups, pixels, image, each * depth * kh * kw)
    tile = launch.conv_tile("conv2d", x.dtype, pixels, each)
    flat, steps = _contraction(depth, kh * kw, tile.depth)
    grid = (triton.cdiv(pixels, tile.rows) * triton.cdiv(each, tile.columns), groups, tasks)
    launch.run(
        kernels.conv_kernel, grid, tile, x, weight, bias, x2, weight2, y, n, h, w, oh, ow, each,
        *stride, *padding, *dilation, CI=depth, KH=kh, KW=kw, STEPS=steps, FLAT=flat,
        BLOCK_P=tile.rows, BLOCK_O=tile.columns, BLOCK_K=tile.depth, **_arithmetic(x.dtype),
    )  # fmt: skip
    return y


def conv2d_input(
    dy: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The adjoint of `conv2d` in x: `dx[p, c] = Σ dy[q, o] w[o, c, tap]` over all q with p at tap.

    Args:
        dy: `[T, N, OH, OW, O]`.
        weight: `[T, O, C/groups, kh, kw]`, of dy's dtype.
        size: H and W.
        stride: as in `conv2d`.
        padding: as in `conv2d`.
        dilation: as in `conv2d`.
        groups: as in `conv2d`.

    Returns:
        dx, `[T, N, H, W, C]`.
    """
    launch.check(dy=dy, weight=weight)
    launch.check_one_dtype(dy=dy, weight=weight)
    tasks, n, oh, ow, outputs = dy.shape
    depth, kh, kw = weight.shape[2:]
    h, w = size
    dx = dy.new_empty(tasks, n, h, w, depth * groups)
    if dx.numel() == 0:
        return dx
    if dy.numel() == 0 or weight.numel() == 0:
        return dx.zero_()
    each = outputs // groups
    # Where the window is dense, only every stride-th tap meets an output.
    every = [s if d == 1 else 1 for s, d in zip(stride, dilation, strict=True)]
    taps = [triton.cdiv(k, e) for k, e in zip((kh, kw), every, strict=True)]
    alike = n * triton.cdiv(h, stride[0]) * triton.cdiv(w, stride[1])
    image = max(h * w * depth * groups, oh * ow * outputs)
    launch.check_sizes(tasks, groups, n * h * w, image, each * depth * kh * kw)
    tile = launch.conv_tile("conv2d_input", dy.dtype, alike, depth)
    flat, steps = _contraction(each, taps[0] * taps[1], tile.depth)
    tiles = triton.cdiv(alike, tile.rows) * stride[0] * stride[1]
    launch.run(
        kernels.conv_input_kernel, (tiles * triton.cdiv(depth, tile.columns), groups, tasks), tile,
        dy, weight, dx, n, h, w, oh, ow, depth, *stride, *padding, *dilation,
        CO=each, KH=kh, KW=kw, EVERY_H=every[0], EVERY_W=every[1], TAPS_H=taps[0], TAPS_W=taps[1],
        STEPS=steps, FLAT=flat, BLOCK_P=tile.rows, BLOCK_C=tile.columns, BLOCK_K=tile.depth,
        **_arithmetic(dy.dtype),
    )  # fmt: skip
    return dx


def conv2d_weight(
    x: Tensor,
    dy: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> tuple[Tensor, Tensor]:
    """The adjoints of `conv2d` in the weight and the bias.

    `dw[o, c, tap] = Σ_p dy[p, o] x[p at tap, c]` and `db[o] = Σ_p dy[p, o]`. Few tiles of dw share
    the pixels among programs, whose parts are then added in a fixed order.

    Args:
        x: `[T, N, H, W, C]`.
        dy: `[T, N, OH, OW, O]`, of x's dtype.
        kernel: kh and kw.
        stride: as in `conv2d`.
        padding: as in `conv2d`.
        dilation: as in `conv2d`.
        groups: as in `conv2d`.
        bias: whether db is wanted.

    Returns:
        dw, `[T, O, C/groups, kh, kw]`, and db, `[T, O]`, or `[0]` if it is not wanted.
    """
    launch.check(x=x, dy=dy)
    launch.check_one_dtype(x=x, dy=dy)
    tasks, n, h, w, channels = x.shape
    oh, ow, outputs = dy.shape[2:]
    kh, kw = kernel
    depth, each, pixels = channels // groups, outputs // groups, n * oh * ow
    shape, weights = (tasks, outputs, depth, kh, kw), tasks * outputs * depth * kh * kw
    total = weights + (tasks * outputs if bias else 0)
    if x.numel() == 0 or dy.numel() == 0:
        db = dy.sum((1, 2, 3)) if bias else x.new_empty(0)
        return x.new_zeros(shape), db
    image = max(h * w * channels, oh * ow * outputs)
    launch.check_sizes(tasks, groups, pixels, image, each * depth * kh * kw)
    tile = launch.conv_tile("conv2d_weight", x.dtype, each, depth * kh * kw)
    flat, columns = _contraction(depth, kh * kw, tile.columns)
    tiles = columns * triton.cdiv(each, tile.rows)
    steps, splits = launch.steps(pixels, tiles * groups * tasks, tile.depth)
    parts = x.new_empty(
        splits, total, dtype=x.dtype if splits == 1 else launch.accumulator(x.dtype)
    )
    launch.run(
        kernels.conv_weight_kernel, (tiles * splits, groups, tasks), tile,
        x, dy, parts, n, h, w, oh, ow, each, total, *stride, *padding, *dilation,
        CI=depth, KH=kh, KW=kw, COLUMNS=columns, FLAT=flat, BIAS=bias, STEPS=steps,
        BLOCK_O=tile.rows, BLOCK_K=tile.columns, BLOCK_P=tile.depth, **_arithmetic(x.dtype),
    )  # fmt: skip
    result = parts[0] if splits == 1 else parts.sum(0).to(x.dtype)
    db = result[weights:].view(tasks, outputs) if bias else x.new_empty(0)
    return result[:weights].view(shape), db


def _contraction(channels: int, taps: int, block: int) -> tuple[bool, int]:
    """Whether taps and channels form one axis, and the number of blocks of that or of both."""
    if channels < block:
        return True, triton.cdiv(channels * taps, block)
    return False, taps * triton.cdiv(channels, block)


def _arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    return {"PRECISION": launch.precision(dtype), "ACC": launch.in_kernel(dtype)}
