"""Pooling of T tasks, closed under differentiation.

A maximum's derivative moves numbers to where the maxima were, its derivative reads them there; an
average is linear, and its adjoint's derivative is the average again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastkfo.functional import checks
from fastkfo.functional.folding import folded
from fastkfo.functional.function import apply, with_eager_form
from fastkfo.kernels import layers, selector

Pair = tuple[int, int]
Size = int | Sequence[int]


class Windows(NamedTuple):
    """How windows go over images, and who computes them. The last two are of averages."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    size: Pair
    out_size: Pair
    implementation: str
    include_pad: bool = True
    divisor: int = 0


def max_pool2d(
    x: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    *,
    ceil_mode: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """The maximum of every window, as `F.max_pool2d` has it; differentiable to any order.

    Of equal maxima the first has the derivative; a NaN is larger than everything.

    Args:
        x: images `[T, N, C, H, W]`, floating, any strides.
        kernel_size: of the window: one number, or down and across.
        stride: between windows; None: the window's size.
        padding: on either side, at most half of the window; it is never the maximum.
        dilation: between the window's pixels.
        ceil_mode: whether a last window may reach beyond the image.
        implementation: "auto", "native", "triton" or "reference".

    Returns:
        `[T, N, C, H', W']`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a value that is not allowed.
        ImplementationUnavailable: the implementation named is not available.
    """
    windows = _windows(x, kernel_size, stride, padding, dilation, ceil_mode, implementation)
    if windows.implementation == "reference":
        geometry = (*windows[:4], ceil_mode)
        return F.max_pool2d(x.flatten(0, 1), *geometry).unflatten(0, x.shape[:2])
    return layers.channels_first(apply(MaxPool2d, layers.channels_last(x), windows)[0])


def avg_pool2d(
    x: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    implementation: str = "auto",
) -> Tensor:
    """The mean of every window, as `F.avg_pool2d` has it; differentiable to any order.

    Args:
        x: images `[T, N, C, H, W]`, floating, any strides.
        kernel_size: of the window: one number, or down and across.
        stride: between windows; None: the window's size.
        padding: zeros on either side, at most half of the window.
        ceil_mode: whether a last window may reach beyond the image.
        count_include_pad: whether padding counts in the mean.
        divisor_override: what sums are divided by instead.
        implementation: "auto", "native", "triton" or "reference".

    Returns:
        `[T, N, C, H', W']`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a value that is not allowed.
        ImplementationUnavailable: the implementation named is not available.
    """
    if divisor_override is not None and (
        isinstance(divisor_override, bool)
        or not isinstance(divisor_override, int)
        or divisor_override == 0
    ):
        raise ValueError(f"divisor_override: expected an int but 0, got {divisor_override!r}")
    windows = _windows(x, kernel_size, stride, padding, 1, ceil_mode, implementation)
    if windows.implementation == "reference":
        geometry = (*windows[:3], ceil_mode, count_include_pad, divisor_override)
        return F.avg_pool2d(x.flatten(0, 1), *geometry).unflatten(0, x.shape[:2])
    windows = windows._replace(include_pad=count_include_pad, divisor=divisor_override or 0)
    return layers.channels_first(apply(AvgPool2d, layers.channels_last(x), windows))


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> int:
    """How many windows fit; with `ceil` one more may reach beyond, if it begins inside."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    if room < 0 and not (ceil and room + stride > 0):
        return 0
    count = (room + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (count - 1) * stride >= size + padding:
        count -= 1
    return count


def _windows(
    x: Tensor,
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    dilation: Size,
    ceil_mode: bool,
    implementation: str,
) -> Windows:
    checks.floating_tensor("x", x)
    if x.dim() != 5:
        raise ValueError(f"x: expected a shape [T, N, C, H, W], got {list(x.shape)}")
    kernel = checks.pair("kernel_size", kernel_size, 1)
    steps = kernel if stride is None else checks.pair("stride", stride, 1)
    pad = checks.pair("padding", padding, 0)
    apart = checks.pair("dilation", dilation, 1)
    for p, k in zip(pad, kernel, strict=True):
        if 2 * p > k:
            raise ValueError(f"padding: expected at most half of {kernel}, got {pad}")
    size = (x.shape[3], x.shape[4])
    counts = [
        out_size(*each, ceil_mode) for each in zip(size, kernel, steps, pad, apart, strict=True)
    ]
    if min(counts) < 1:
        raise ValueError(f"kernel_size: expected at most the padded image's, got {kernel}")
    chosen = selector.select(implementation, x.device, "layers")
    return Windows(kernel, steps, pad, apart, size, (counts[0], counts[1]), chosen)


def _max_geometry(w: Windows) -> tuple[list[int], ...]:
    return list(w.kernel), list(w.stride), list(w.padding), list(w.dilation)


@with_eager_form
class MaxPool2d(Function):
    """The maxima, and where they were."""

    @staticmethod
    def forward(x: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
        operands = (x.contiguous(), *_max_geometry(windows), list(windows.out_size))
        y, where = layers.run(windows.implementation, "max_pool2d", *operands)
        return layers.narrowed(y, x), where

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.windows = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, None]:
        if dy is None:
            return None, None
        return apply(MaxPoolScatter, dy, *ctx.saved_tensors, ctx.windows), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return folded(MaxPool2d, info, in_dims, args)


@with_eager_form
class MaxPoolScatter(Function):
    """Cotangents to where the maxima were."""

    @staticmethod
    def forward(dy: Tensor, where: Tensor, windows: Windows) -> Tensor:
        operands = (dy.contiguous(), where, list(windows.size), *_max_geometry(windows))
        dx = layers.run(windows.implementation, "max_pool2d_scatter", *operands)
        return layers.narrowed(dx, dy)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, where, ctx.windows = inputs
        ctx.save_for_backward(where)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None, None]:
        return apply(MaxPoolGather, v, *ctx.saved_tensors, ctx.windows), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return folded(MaxPoolScatter, info, in_dims, args)


@with_eager_form
class MaxPoolGather(Function):
    """What lies where the maxima were."""

    @staticmethod
    def forward(v: Tensor, where: Tensor, windows: Windows) -> Tensor:
        found = layers.run(windows.implementation, "max_pool2d_gather", v.contiguous(), where)
        return layers.narrowed(found, v)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, where, ctx.windows = inputs
        ctx.save_for_backward(where)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return apply(MaxPoolScatter, dy, *ctx.saved_tensors, ctx.windows), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return folded(MaxPoolGather, info, in_dims, args)


def _avg_geometry(w: Windows) -> tuple[Any, ...]:
    return list(w.kernel), list(w.stride), list(w.padding)


@with_eager_form
class AvgPool2d(Function):
    """The means."""

    @staticmethod
    def forward(x: Tensor, windows: Windows) -> Tensor:
        w = windows
        rest = (*_avg_geometry(w), list(w.out_size), w.include_pad, w.divisor)
        return layers.narrowed(layers.run(w.implementation, "avg_pool2d", x.contiguous(), *rest), x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.windows = inputs[1]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return apply(AvgPoolBackward, dy, ctx.windows), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return folded(AvgPool2d, info, in_dims, args)


@with_eager_form
class AvgPoolBackward(Function):
    """Every cotangent in equal shares to its window."""

    @staticmethod
    def forward(dy: Tensor, windows: Windows) -> Tensor:
        w = windows
        rest = (list(w.size), *_avg_geometry(w), w.include_pad, w.divisor)
        dx = layers.run(w.implementation, "avg_pool2d_backward", dy.contiguous(), *rest)
        return layers.narrowed(dx, dy)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.windows = inputs[1]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:
        return apply(AvgPool2d, v, ctx.windows), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return folded(AvgPoolBackward, info, in_dims, args)
