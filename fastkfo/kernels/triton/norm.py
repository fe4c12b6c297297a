"""Task-batched batch norm (+ReLU), its backward, and that one's.

Each is a reduction and an elementwise pass, two launches. Sums run in a fixed order. Weights may
have another dtype than x; their gradients then have theirs.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from fastkfo.kernels.triton import launch
from fastkfo.kernels.triton import norm_kernels as kernels


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`y = relu?((x − mean) rstd γ + β)` with `rstd = 1/√(var + eps)`, per task and channel.

    The variance is the biased one, of deviations from the mean, never E[x²] − E[x]².

    Args:
        x: `[T, P, C]`, P all pixels of all samples.
        weight: γ, `[T, C]`, or None for one.
        bias: β, `[T, C]`, or None for zero.
        eps: is added to the variance.
        relu: whether negative results become zero.

    Returns:
        y, of x's shape and dtype; mean and var, `[T, C]`, float32 (float64 for float64).
    """
    launch.check(x=x, weight=weight, bias=bias)
    y = x.new_empty(x.shape)
    mean = x.new_empty(x.shape[0], x.shape[2], dtype=launch.accumulator(x.dtype))
    var = x.new_empty(mean.shape, dtype=mean.dtype)
    if x.numel() == 0:
        return y, mean.zero_(), var.zero_()
    plan = _Plan("norm", x, 2)
    plan.run(kernels.stats_kernel, x, plan.parts)
    plan.run(
        kernels.normalise_kernel, x, weight, bias, plan.parts, y, mean, var,
        EPS=eps, RELU=relu, CHUNKS=plan.chunks,
    )  # fmt: skip
    return y, mean, var


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `batch_norm`.

    With `x̂ = (x − mean) rstd`, `z = γ x̂ + β`, dz = dy where z > 0 (everywhere without relu) and
    n = P: `dβ = Σ dz`, `dγ = Σ dz x̂`, `dx = γ rstd (dz − dβ/n − x̂ dγ/n)`.

    Args:
        dy: `[T, P, C]`.
        x: `[T, P, C]`.
        mean: `[T, C]`, as `batch_norm` returned it.
        rstd: `1/√(var + eps)`, `[T, C]`.
        weight: γ, `[T, C]`, or None for one.
        bias: β, `[T, C]`, or None for zero.
        relu: as in `batch_norm`.

    Returns:
        dx, `[T, P, C]`; dγ and dβ, `[T, C]`, of γ's and β's dtype (mean's without them).
    """
    launch.check(dy=dy, x=x, mean=mean, rstd=rstd, weight=weight, bias=bias)
    dx = x.new_empty(x.shape)
    dweight, dbias = (mean.new_empty(mean.shape, dtype=_dtype(v, mean)) for v in (weight, bias))
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    plan = _Plan("norm", x, 2)
    operands = (dy, x, mean, rstd, weight, bias, plan.parts)
    plan.run(kernels.backward_sums_kernel, *operands, RELU=relu)
    plan.run(kernels.backward_kernel, *operands, dx, dweight, dbias, RELU=relu, CHUNKS=plan.chunks)
    return dx, dweight, dbias


def batch_norm_double_backward(
    a: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of `S = <a, dx> + <b, dγ> + <c, dβ>` of `batch_norm_backward` in dy, x and γ.

    With `s1 = Σ dz`, `s2 = Σ dz x̂`, `A1 = Σ a`, `A2 = Σ a x̂`, `A3 = Σ a dz`, r = rstd, n = P, and m
    one where z > 0:

    `d_dy = m (γ r (a − A1/n − x̂ A2/n) + b x̂ + c)`,
    `dγ = r (A3 − A1 s1/n − A2 s2/n)`,
    `h = −γ r (a s2 + dz A2)/n + b dz`,
    `dx = r (h − mean(h) − x̂ mean(h x̂)) − r x̂ γ dγ / n`.

    Args:
        a: `[T, P, C]`, or None for zero.
        b: `[T, C]`, or None for zero.
        c: `[T, C]`, or None for zero.
        dy: `[T, P, C]`.
        x: `[T, P, C]`.
        mean: `[T, C]`, as `batch_norm` returned it.
        rstd: `1/√(var + eps)`, `[T, C]`.
        weight: γ, `[T, C]`, or None for one.
        bias: β, `[T, C]`, or None for zero.
        relu: as in `batch_norm`.

    Returns:
        d_dy and dx, `[T, P, C]`; dγ, `[T, C]`, of γ's dtype (mean's without it).
    """
    launch.check(a=a, b=b, c=c, dy=dy, x=x, mean=mean, rstd=rstd, weight=weight, bias=bias)
    d_dy, dx = dy.new_empty(dy.shape), x.new_empty(x.shape)
    dweight = mean.new_empty(mean.shape, dtype=_dtype(weight, mean))
    if x.numel() == 0:
        return d_dy, dx, dweight.zero_()
    count = 2 if a is None else 5
    plan = _Plan("norm_double", x, count)
    operands = (dy, x, mean, rstd, weight, bias, plan.parts)
    if a is None:
        plan.run(kernels.backward_sums_kernel, *operands, RELU=relu)
    else:
        plan.run(kernels.double_backward_sums_kernel, a, *operands, RELU=relu)
    plan.run(
        kernels.double_backward_kernel, a, b, c, *operands, d_dy, dx, dweight,
        RELU=relu, PARTS=count, CHUNKS=plan.chunks,
    )  # fmt: skip
    return d_dy, dx, dweight


class _Plan:
    """How one op is spread over programs, the same for its two kernels."""

    def __init__(self, op: str, x: Tensor, parts: int):
        tasks, self.rows, self.channels = x.shape
        self.tile = launch.plain_tile(op, x.dtype, self.rows, self.channels)
        blocks = triton.cdiv(self.channels, self.tile.columns)
        self.steps, count = launch.steps(self.rows, blocks * tasks, self.tile.rows)
        launch.check_sizes(tasks, blocks, self.rows, self.steps * self.tile.rows * self.channels)
        self.grid = (count, blocks, tasks)
        self.chunks = triton.next_power_of_2(count)
        self.dtype = x.dtype
        self.parts = x.new_empty(
            tasks, count, parts, self.channels, dtype=launch.accumulator(x.dtype)
        )

    def run(self, kernel: Any, *operands: Tensor | None, **constants: Any) -> None:
        """Start a kernel on these operands; the first one present says on which device."""
        launch.run(
            kernel, self.grid, self.tile, *operands, self.rows, self.channels,
            STEPS=self.steps, ACC=launch.in_kernel(self.dtype),
            BLOCK_P=self.tile.rows, BLOCK_C=self.tile.columns, **constants,
        )  # fmt: skip


def _dtype(parameter: Tensor | None, mean: Tensor) -> Any:
    return (mean if parameter is None else parameter).dtype
