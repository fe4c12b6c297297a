"""Convolutions of T tasks at once, closed under differentiation.

A convolution is bilinear: it, its adjoint in the image and its derivative in the weights are each
other's derivatives, so two autograd Functions serve every order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import Function

from fastkfo.functional import checks
from fastkfo.functional.folding import folded
from fastkfo.functional.function import apply, with_eager_form
from fastkfo.kernels import layers, selector
from fastkfo.reference import conv as reference

Pair = tuple[int, int]


class Window(NamedTuple):
    """How a convolution goes over its images, and who computes it."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    implementation: str = "native"

    @property
    def numbers(self) -> tuple[list[int], list[int], list[int], int]:
        """As the raw ops take it."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    implementation: str = "auto",
) -> Tensor:
    """`y_t = x_t ⋆ w_t + b_t` for every task t; differentiable to any order in all of them.

    What `F.conv2d` computes per task. Images that lie channels last (as results do) are not copied.
    bfloat16 and float16 are summed in float32.

    Args:
        x: images `[T, N, C, H, W]`, floating, any strides.
        weight: `[T, O, C / groups, kh, kw]`.
        bias: `[T, O]`, or None for zero.
        stride: of the window: one number, or down and across.
        padding: zeros on either side, likewise.
        dilation: between the taps, likewise.
        groups: of channels, which divides C and O.
        implementation: "auto", "native", "triton" or "reference".

    Returns:
        `[T, N, O, H', W']`, channels last in memory.

    Raises:
        TypeError: an operand is no floating-point tensor, or their dtypes differ.
        ValueError: shapes or devices do not match, channels are not divisible by groups, or the
            window is larger than the padded image.
        ImplementationUnavailable: the implementation named is not available.

    Source: docs/layers.md has the derivatives.
    """
    checks.operands(x=x, weight=weight, bias=bias)
    steps = checks.pair("stride", stride, 1)
    pad = checks.pair("padding", padding, 0)
    apart = checks.pair("dilation", dilation, 1)
    window = Window(steps, pad, apart, groups, implementation)
    _check_shapes(x, weight, bias, window)
    return conv2d_unchecked(x, weight, bias, window)


def conv2d_unchecked(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """`conv2d` for operands known to be right."""
    chosen = selector.select(window.implementation, x.device, "layers")
    if chosen == "reference":
        return reference.conv2d(x, weight, bias, *window[:4])
    window = window._replace(implementation=chosen)
    images: Tensor = apply(Conv2d, layers.channels_last(x), weight, bias, None, None, window)
    return layers.channels_first(images)


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> None:
    groups = window.groups
    if x.dim() != 5:
        raise ValueError(f"x: expected a shape [T, N, C, H, W], got {list(x.shape)}")
    if weight.dim() != 5 or 0 in weight.shape[3:]:
        raise ValueError(
            f"weight: expected a shape [T, O, C / groups, kh, kw], got {list(weight.shape)}"
        )
    if weight.shape[0] != x.shape[0]:
        raise ValueError(f"weight: expected {x.shape[0]} tasks as x, got {weight.shape[0]}")
    channels, outputs = x.shape[2], weight.shape[1]
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups: expected an int of at least 1, got {groups!r}")
    if channels % groups or outputs % groups:
        raise ValueError(
            f"groups: expected a divisor of {channels} and {outputs} channels, got {groups}"
        )
    if weight.shape[2] * groups != channels:
        raise ValueError(
            f"weight: expected {channels // groups} channels per group, got {weight.shape[2]}"
        )
    checks.shapes(tuple(weight.shape[:2]), bias=bias)
    for axis in (0, 1):
        size = x.shape[3 + axis] + 2 * window.padding[axis]
        span = window.dilation[axis] * (weight.shape[3 + axis] - 1) + 1
        if span > size:
            raise ValueError(f"weight: expected a window of at most {size} pixels, got {span}")


@with_eager_form
class Conv2d(Function):
    """`x ⋆ weight + x2 ⋆ weight2 + bias`; the second pair may be missing, and so may the bias.

    Images are `[T, N, H, W, C]` here, so that what is returned is no view: PyTorch does not let a
    view that a Function has made be written to.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x2: Tensor | None,
        weight2: Tensor | None,
        window: Window,
    ) -> Tensor:
        operands = [None if t is None else t.contiguous() for t in (x, weight, bias, x2, weight2)]
        y: Tensor = layers.run(window.implementation, "conv2d", *operands, *window.numbers)
        return layers.narrowed(y, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, x2, weight2, ctx.window = inputs
        ctx.save_for_backward(x, weight, x2, weight2)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        x, weight, x2, weight2 = ctx.saved_tensors
        need = ctx.needs_input_grad
        dx = dw = db = dx2 = dw2 = None
        if any(need[:3]):
            dx, dw, db = apply(Conv2dBackward, dy, x, weight, ctx.window, tuple(need[:3]))
        if any(need[3:5]):
            wanted = (need[3], need[4], False)
            dx2, dw2, _ = apply(Conv2dBackward, dy, x2, weight2, ctx.window, wanted)
        return dx, dw, db, dx2, dw2, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return folded(Conv2d, info, in_dims, args)


@with_eager_form
class Conv2dBackward(Function):
    """The cotangents of x, weight and bias; None for those that are not wanted."""

    @staticmethod
    def forward(
        dy: Tensor, x: Tensor, weight: Tensor, window: Window, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        dx: Any = None
        dw: Any = None
        db: Any = None
        dy = dy.contiguous()
        if wanted[0]:
            operands = (dy, weight.contiguous(), list(x.shape[2:4]))
            dx = layers.run(window.implementation, "conv2d_input", *operands, *window.numbers)
            dx = layers.narrowed(dx, x)
        if wanted[1] or wanted[2]:
            operands = (x.contiguous(), dy, list(weight.shape[3:]))
            dw, db = layers.run(
                window.implementation, "conv2d_weight", *operands, *window.numbers, wanted[2]
            )
            dw, db = layers.narrowed(dw, weight), layers.narrowed(db, weight)
        return dx, dw if wanted[1] else None, db if wanted[2] else None

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        dy, x, weight, ctx.window, _ = inputs
        ctx.save_for_backward(dy, x, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, v: Tensor | None, u: Tensor | None, t: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        dy, x, weight = ctx.saved_tensors
        to_dy = to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            to_dy = _along(v, weight, t, x, u, dy, ctx.window)
        wanted = (
            ctx.needs_input_grad[1] and u is not None,
            ctx.needs_input_grad[2] and v is not None,
            False,
        )
        if any(wanted):  # a missing one lends its shape
            pair = (x if v is None else v, weight if u is None else u)
            to_x, to_weight, _ = apply(Conv2dBackward, dy, *pair, ctx.window, wanted)
        return to_dy, to_x, to_weight, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return folded(Conv2dBackward, info, in_dims, args)


def _along(
    v: Tensor | None,
    weight: Tensor,
    t: Tensor | None,
    x: Tensor,
    u: Tensor | None,
    dy: Tensor,
    window: Window,
) -> Tensor | None:
    """The derivative of a convolution along v, u and t, directions of x, weight and bias."""
    pairs = [p for p in ((v, weight), (x, u)) if p[0] is not None and p[1] is not None]
    if not pairs:
        return None if t is None else t[:, None, None, None, :].expand_as(dy)
    second = pairs[1] if len(pairs) > 1 else (None, None)
    result: Tensor = apply(Conv2d, *pairs[0], t, *second, window)
    return result
