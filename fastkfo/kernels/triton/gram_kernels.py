"""The products that make factors positive semi-definite: kernels of `gram_products.py`.

Factors are `[count, R, n]` without gaps. Axes of every grid: the tiles of one result, the factors.
A step is DEPTH terms of the sum that is contracted.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

_SIZES = ["R", "n"]  # change from call to call: no kernel is compiled anew for their values


@triton.jit
def _load(x, i, j, rows, cols, ACC: tl.constexpr):
    """x[i, j] of a matrix `[rows, cols]`, zero beyond it; 64 bits, since a factor may be large."""
    at = i.to(tl.int64) * cols + j
    return tl.load(x + at, mask=(i < rows) & (j < cols), other=0.0).to(ACC)


@triton.jit(do_not_specialize=_SIZES)
def gram_kernel(
    factor, tangent, out, R, n, STEPS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """LᵀL, or LᵀM + MᵀL with a tangent M: tiles of `[n, n]`."""
    blocks = tl.cdiv(n, COLUMNS)
    i = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)[None, :]
    j = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    task = tl.program_id(1).to(tl.int64)
    factor += task * R * n
    acc = tl.zeros([ROWS, COLUMNS], dtype=ACC)
    for step in range(STEPS):
        r = step * DEPTH + tl.arange(0, DEPTH)[:, None]
        b_i = _load(factor, r, i, R, n, ACC)  # [DEPTH, ROWS]
        b_j = _load(factor, r, j, R, n, ACC)  # [DEPTH, COLUMNS]
        if tangent is None:
            acc = tl.dot(tl.trans(b_i), b_j, acc, input_precision=PRECISION, out_dtype=ACC)
        else:
            b_mi = _load(tangent + task * R * n, r, i, R, n, ACC)
            b_mj = _load(tangent + task * R * n, r, j, R, n, ACC)
            acc = tl.dot(tl.trans(b_i), b_mj, acc, input_precision=PRECISION, out_dtype=ACC)
            acc = tl.dot(tl.trans(b_mi), b_j, acc, input_precision=PRECISION, out_dtype=ACC)
    i = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    at = task * n * n + i.to(tl.int64) * n + j
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(i < n) & (j < n))


@triton.jit(do_not_specialize=_SIZES)
def gram_vjp_kernel(
    factor, cotangent, out, R, n, STEPS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """L (V + Vᵀ): tiles of `[R, n]`."""
    blocks = tl.cdiv(n, COLUMNS)
    r = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    j = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    task = tl.program_id(1).to(tl.int64)
    factor += task * R * n
    cotangent += task * n * n
    acc = tl.zeros([ROWS, COLUMNS], dtype=ACC)
    for step in range(STEPS):
        k = step * DEPTH + tl.arange(0, DEPTH)
        b_l = _load(factor, r, k[None, :], R, n, ACC)
        b_v = _load(cotangent, k[:, None], j, n, n, ACC) + _load(
            cotangent, j, k[:, None], n, n, ACC
        )
        acc = tl.dot(b_l, b_v, acc, input_precision=PRECISION, out_dtype=ACC)
    at = task * R * n + r.to(tl.int64) * n + j
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(r < R) & (j < n))
