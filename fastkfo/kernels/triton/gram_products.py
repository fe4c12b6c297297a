"""The products that make factors positive semi-definite: the raw ops gram, gram_vjp, gram_jvp.

A launch per factor, over its matrices and tiles of the result; any size. Products are as exact as
the Kronecker update's (`kron.py`). (No module is named `gram`: that is the op's name here.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import triton
from torch import Tensor

from fastkfo.kernels.triton import gram_kernels as kernels
from fastkfo.kernels.triton import launch


def gram(factors: Sequence[Tensor]) -> list[Tensor]:
    """`LᵀL` of every factor.

    Args:
        factors: L, `[..., r, n]`.

    Returns:
        One `[..., n, n]` per factor.
    """
    return [_square(_checked(factors, i), None) for i in range(len(factors))]


def gram_jvp(factors: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
    """`LᵀM + MᵀL`, the derivative of `gram` along M.

    Args:
        factors: L, `[..., r, n]`.
        tangents: M, as many elements as L.

    Returns:
        One `[..., n, n]` per factor.
    """
    _check_lengths("tangents", tangents, factors)
    return [
        _square(x, _partner("tangents", tangents, i, x, x.shape[-2]))
        for i, x in enumerate(_checked(factors, i) for i in range(len(factors)))
    ]


def gram_vjp(factors: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """`L (V + Vᵀ)`, the vector-Jacobian product of `gram`.

    Args:
        factors: L, `[..., r, n]`.
        cotangents: V, `[..., n, n]`.

    Returns:
        One `[..., r, n]` per factor.
    """
    _check_lengths("cotangents", cotangents, factors)
    results = []
    for i in range(len(factors)):
        x = _checked(factors, i)
        v = _partner("cotangents", cotangents, i, x, x.shape[-1])
        out = x.new_empty(x.shape)
        results.append(out)
        _run(kernels.gram_vjp_kernel, x, v, out, depth=x.shape[-1])
    return results


def _square(x: Tensor, tangent: Tensor | None) -> Tensor:
    rows, n = x.shape[-2:]
    out = x.new_empty((*x.shape[:-2], n, n))
    if rows == 0:
        return out.zero_()
    _run(kernels.gram_kernel, x, tangent, out, depth=rows)
    return out


def _run(kernel: Any, x: Tensor, partner: Tensor | None, out: Tensor, depth: int) -> None:
    """Start a kernel over the tiles of a result, `depth` terms to each of its numbers."""
    if out.numel() == 0:
        return
    rows, columns = out.shape[-2:]
    tile = launch.gram_tile(x.dtype, rows, columns)
    launch.check_sizes(math.prod(out.shape[:-2]), 1, max(*x.shape[-2:]), 0)
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),
            math.prod(out.shape[:-2]), 1)  # fmt: skip
    launch.run(
        kernel, grid, tile, x, partner, out, *x.shape[-2:],
        STEPS=triton.next_power_of_2(triton.cdiv(depth, tile.depth)),
        PRECISION=launch.precision(launch.accumulator(x.dtype), "matmul"),
        ACC=launch.in_kernel(x.dtype), ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
    )  # fmt: skip


def _checked(factors: Sequence[Tensor], i: int) -> Tensor:
    """A factor without gaps."""
    x = factors[i]
    launch.check_operand(f"factors[{i}]", x, factors[0])
    if x.dim() < 2:
        raise ValueError(f"factors[{i}]: expected a shape [..., r, n], got {list(x.shape)}")
    return x.resolve_neg().contiguous()


def _check_lengths(name: str, partners: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    if len(partners) != len(factors):
        raise ValueError(f"{name}: expected {len(factors)} tensors, got {len(partners)}")


def _partner(name: str, partners: Sequence[Tensor], i: int, x: Tensor, rows: int) -> Tensor:
    """What a factor is multiplied by, `rows` to each of its matrices, without gaps."""
    y = partners[i]
    launch.check_operand(f"{name}[{i}]", y, x)
    expected = math.prod(x.shape[:-2]) * rows * x.shape[-1]
    if y.numel() != expected:
        raise ValueError(f"{name}[{i}]: expected {expected} elements, got {list(y.shape)}")
    return y.resolve_neg().contiguous()
