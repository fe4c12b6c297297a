"""What the Kronecker kernels are made of: tiles, products with factors, sums over the batch.

A tile is `[N, BLOCK_B M]`, its columns batch entry and column of a matrix: a left factor
multiplies it as it is, a right one after a reshape to `[N BLOCK_B, M]`. N and M are n and m padded
to powers of two; a factor of one number multiplies element by element. Within a task nothing has
gaps; offsets within a tile take 32 bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def tile(
    chunk, step, B, n, m, STEPS: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Where a tile begins in its task, the offsets in it, and which of them are there."""
    first = (chunk * STEPS + step) * BLOCK_B
    i = tl.arange(0, N)[:, None]
    column = tl.arange(0, BLOCK_B * M)[None, :]
    b, j = column // M, column % M
    at = b * (n * m) + (i * m + j)
    return first.to(tl.int64) * (n * m), at, (i < n) & (first + b < B) & (j < m)


@triton.jit
def matrix(x, at, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr):
    """A matrix without gaps, `[ROWS, COLS]`; a zero that nobody reads where x is absent."""
    if x is None:  # no early return: Triton would compile what follows
        b_x = tl.zeros([1, 1], dtype=ACC)
    else:
        i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
        b_x = tl.load(x + at + (i * cols + j), mask=(i < rows) & (j < cols), other=0.0).to(ACC)
    return b_x


@triton.jit
def bias_of(
    x, at, n, m, N: tl.constexpr, M: tl.constexpr, BLOCK_B: tl.constexpr, ACC: tl.constexpr
):
    """β of every batch entry of a tile."""
    i = tl.arange(0, N)[:, None]
    j = tl.arange(0, BLOCK_B * M)[None, :] % M
    return tl.load(x + at + (i * m + j), mask=(i < n) & (j < m), other=0.0).to(ACC)


@triton.jit
def scale_of(x, task_at, tile_at, at, ok, FULL: tl.constexpr, ACC: tl.constexpr):
    """S of a tile, or `[1, 1]` where it is one number; one where it is absent."""
    if x is None:
        b_s = tl.full([1, 1], 1.0, ACC)
    else:
        if FULL:
            b_s = tl.load(x + task_at + tile_at + at, mask=ok, other=0.0).to(ACC)
        else:
            b_s = tl.load(x + task_at + tl.zeros([1, 1], dtype=tl.int32)).to(ACC)
    return b_s


@triton.jit
def left_product(b_a, b_x, N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """A X of every matrix X of a tile."""
    return b_a * b_x if N == 1 else tl.dot(b_a, b_x, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def right_product(
    b_x, b_c, N: tl.constexpr, M: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """X C of every matrix X of a tile."""
    if M == 1:
        b_y = b_x * b_c
    else:
        b_rows = tl.reshape(b_x, [N * BLOCK_B, M])
        b_y = tl.dot(b_rows, b_c, input_precision=PRECISION, out_dtype=ACC)
        b_y = tl.reshape(b_y, [N, BLOCK_B * M])
    return b_y


@triton.jit
def add_left(acc, b_x, b_y, N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """Add Σ X Yᵀ, `[N, N]`."""
    if N == 1:
        acc += tl.sum(b_x * b_y, axis=1)[:, None]
    else:
        acc = tl.dot(b_x, tl.trans(b_y), acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def add_right(
    acc, b_x, b_y, N: tl.constexpr, M: tl.constexpr, BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add Σ Xᵀ Y, `[M, M]`."""
    if M == 1:
        acc += _total(b_x * b_y)
    else:
        b_x = tl.trans(tl.reshape(b_x, [N * BLOCK_B, M]))
        b_y = tl.reshape(b_y, [N * BLOCK_B, M])
        acc = tl.dot(b_x, b_y, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def _total(b_x):
    """The sum of a tile, `[1, 1]`."""
    return tl.sum(tl.sum(b_x, axis=1)[:, None], axis=0)[None, :]


@triton.jit
def _store_matrix(to, b_x, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    tl.store(to + (i * cols + j), b_x, mask=(i < rows) & (j < cols))


@triton.jit
def store_sums(
    row, acc_a, acc_c, acc_bias, acc_scale, at_right, at_bias, at_scale, n, m,
    WANTED: tl.constexpr, FULL: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """What a program summed up, to its row of `parts`."""
    if WANTED & 2:
        _store_matrix(row, acc_a, n, n, N, N)
    if WANTED & 4:
        _store_matrix(row + at_right, acc_c, m, m, M, M)
    if WANTED & 8:
        b_bias = tl.sum(tl.reshape(acc_bias, [N, BLOCK_B, M]), axis=1)
        _store_matrix(row + at_bias, b_bias, n, m, N, M)
    if (WANTED & 16) and not FULL:
        tl.store(row + at_scale + tl.zeros([1, 1], dtype=tl.int32), _total(acc_scale))
