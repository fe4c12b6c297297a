"""Task-batched pooling and its adjoints: one kernel each.

Nothing is added atomically: in the adjoints, every pixel of the input asks the windows it lies in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fastkfo.kernels.triton import launch
from fastkfo.kernels.triton import pool_kernels as kernels


def max_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The maximum of every window, and where it is; of equal ones the first, NaN before all.

    Args:
        x: `[T, N, H, W, C]`.
        kernel: kh and kw.
        stride: of rows and of columns.
        padding: on either side; it never wins.
        dilation: of rows and of columns.
        size: OH and OW; windows may reach beyond the padding (ceil_mode).

    Returns:
        y, `[T, N, OH, OW, C]`, and `where`, int32 of the same shape: h·W + w. A window without a
        pixel has −∞ and −1.
    """
    launch.check(x=x)
    tasks, n, h, w, channels = x.shape
    y = x.new_empty(tasks, n, *size, channels)
    where = x.new_empty(y.shape, dtype=torch.int32)
    if x.numel() == 0:
        return y.fill_(-torch.inf), where.fill_(-1)
    _run(
        kernels.max_pool_kernel, x, y, (x, y, where), (h, w, *size),
        (*stride, *padding, *dilation), KH=kernel[0], KW=kernel[1], ACC=launch.in_kernel(x.dtype),
    )  # fmt: skip
    return y, where


def max_pool2d_scatter(
    dy: Tensor,
    where: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The adjoint of `max_pool2d_gather`: `dx[p] = Σ dy[q]` over all windows q with `where[q] = p`.

    Args:
        dy: `[T, N, OH, OW, C]`.
        where: int32, as `max_pool2d` returned it.
        size: H and W.
        kernel: as in `max_pool2d`.
        stride: as in `max_pool2d`.
        padding: as in `max_pool2d`.
        dilation: as in `max_pool2d`.

    Returns:
        dx, `[T, N, H, W, C]`.
    """
    launch.check(dy=dy)
    launch.check_index(where=where, like=dy)
    tasks, n, oh, ow, channels = dy.shape
    dx = dy.new_empty(tasks, n, *size, channels)
    if dy.numel() == 0:
        return dx.zero_()
    _run(
        kernels.max_pool_scatter_kernel, dy, dx, (dy, where, dx), (*size, oh, ow),
        (*stride, *padding, *dilation), KH=kernel[0], KW=kernel[1], ACC=launch.in_kernel(dy.dtype),
    )  # fmt: skip
    return dx


def max_pool2d_gather(v: Tensor, where: Tensor) -> Tensor:
    """The entries of v at `where`; zero where that is −1.

    Args:
        v: `[T, N, H, W, C]`.
        where: int32, `[T, N, OH, OW, C]`, as `max_pool2d` returned it.

    Returns:
        `[T, N, OH, OW, C]`, of v's dtype.
    """
    launch.check(v=v)
    launch.check_index(where=where, like=v)
    h, w = v.shape[2:4]
    y = v.new_empty(where.shape)
    if v.numel() == 0:
        return y.zero_()
    _run(kernels.max_pool_gather_kernel, v, y, (v, where, y), (h, w, *where.shape[2:4]), ())
    return y


def avg_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    size: Sequence[int],
    include_pad: bool,
    divisor: int,
) -> Tensor:
    """The sum of every window over a divisor, as torch.nn.functional.avg_pool2d has it.

    The divisor is `divisor`, else the number of the window's pixels, those of the padding among
    them with `include_pad`, but never those beyond it (ceil_mode).

    Args:
        x: `[T, N, H, W, C]`.
        kernel: kh and kw.
        stride: of rows and of columns.
        padding: zeros on either side.
        size: OH and OW; windows may reach beyond the padding.
        include_pad: whether the padding counts.
        divisor: 0 for none.

    Returns:
        y, `[T, N, OH, OW, C]`.
    """
    launch.check(x=x)
    tasks, n, h, w, channels = x.shape
    y = x.new_empty(tasks, n, *size, channels)
    if x.numel() == 0:
        return y.zero_()
    _run(
        kernels.avg_pool_kernel, x, y, (x, y), (h, w, *size), (*stride, *padding, divisor),
        KH=kernel[0], KW=kernel[1], INCLUDE_PAD=include_pad, ACC=launch.in_kernel(x.dtype),
    )  # fmt: skip
    return y


def avg_pool2d_backward(
    dy: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    include_pad: bool,
    divisor: int,
) -> Tensor:
    """The adjoint of `avg_pool2d`: `dx[p] = Σ dy[q] / divisor[q]` over all windows q that have p.

    Args:
        dy: `[T, N, OH, OW, C]`.
        size: H and W.
        kernel: as in `avg_pool2d`.
        stride: as in `avg_pool2d`.
        padding: as in `avg_pool2d`.
        include_pad: as in `avg_pool2d`.
        divisor: as in `avg_pool2d`.

    Returns:
        dx, `[T, N, H, W, C]`.
    """
    launch.check(dy=dy)
    tasks, n, oh, ow, channels = dy.shape
    dx = dy.new_empty(tasks, n, *size, channels)
    if dy.numel() == 0:
        return dx.zero_()
    _run(
        kernels.avg_pool_backward_kernel, dy, dx, (dy, dx), (*size, oh, ow),
        (*stride, *padding, divisor), KH=kernel[0], KW=kernel[1], INCLUDE_PAD=include_pad,
        ACC=launch.in_kernel(dy.dtype),
    )  # fmt: skip
    return dx


def _run(
    kernel: Any,
    source: Tensor,
    output: Tensor,
    tensors: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    window: tuple[int, ...],
    **constants: Any,
) -> None:
    """Start a kernel on tiles of the output's pixels and channels."""
    if output.numel() == 0:
        return
    tasks, n, h, w, channels = output.shape
    tile = launch.plain_tile("pool", output.dtype, n * h * w, channels)
    blocks = triton.cdiv(channels, tile.columns)
    image = max(h * w, source.shape[2] * source.shape[3]) * channels
    launch.check_sizes(tasks, blocks, max(n * h * w, source[0, ..., 0].numel()), image)
    launch.run(
        kernel, (triton.cdiv(n * h * w, tile.rows), blocks, tasks), tile,
        *tensors, n, *sizes, channels, *window,
        BLOCK_P=tile.rows, BLOCK_C=tile.columns, **constants,
    )  # fmt: skip
