"""Batch norm on batch statistics: the kernels that `norm.py` launches.

x is `[T, P, C]`. Axes of every grid: chunks of P, blocks of C, tasks. A chunk is STEPS tiles of
BLOCK_P rows. A reduction writes one part per chunk, `[T, chunks, parts, C]`; every program of the
elementwise pass that follows adds up the parts of its channels, which spares a third launch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

_SIZES = ["P"]  # changes from call to call: no kernel is compiled anew for its value


@triton.jit
def _place(P, C, STEPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of this program: its task, its channels and their offset in `[T, C]`, its rows in x."""
    task = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    start = tl.program_id(0) * (STEPS * BLOCK_P)
    return task, c, task * C + c, start, (task * P + start) * C


@triton.jit
def _channel(
    values, at, ok, default: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The values of this program's channels, `[1, BLOCK_C]`; `default` where there are none."""
    if values is None:  # no early return: Triton would compile what follows
        b_values = tl.full([1, BLOCK_C], default, ACC)
    else:
        b_values = tl.load(values + at, mask=ok, other=0.0).to(ACC)
    return b_values


@triton.jit
def _part(parts, i: tl.constexpr, PARTS: tl.constexpr, task, c, C):
    """Where this chunk's i-th part is."""
    chunk = task * tl.num_programs(0) + tl.program_id(0)
    return parts + (chunk * PARTS + i) * C + c


@triton.jit
def _parts(
    parts, i: tl.constexpr, PARTS: tl.constexpr, task, c, C, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The i-th part of every chunk, `[CHUNKS, BLOCK_C]`, zero beyond the last."""
    chunk = tl.arange(0, CHUNKS)[:, None]
    at = ((task * tl.num_programs(0) + chunk) * PARTS + i) * C + c
    return tl.load(parts + at, mask=(chunk < tl.num_programs(0)) & (c < C), other=0.0)


@triton.jit
def _total(parts, i: tl.constexpr, PARTS: tl.constexpr, task, c, C, CHUNKS: tl.constexpr):
    """Their sum in a fixed order, `[1, BLOCK_C]`."""
    return tl.sum(_parts(parts, i, PARTS, task, c, C, CHUNKS), axis=0)[None, :]


@triton.jit(do_not_specialize=_SIZES)
def stats_kernel(
    x, parts, P, C, STEPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Per chunk: the mean of d = x − x[0], and Σ (d − mean)²; the second read is from the cache.

    Statistics of differences to a sample keep their digits where x is far from zero: a sample is
    no farther than √P standard deviations from the mean.
    """
    task, c, _, start, first = _place(P, C, STEPS, BLOCK_P, BLOCK_C)
    shift = tl.load(x + task * P * C + c, mask=c < C, other=0.0).to(ACC)
    x += first
    rows = tl.arange(0, BLOCK_P)[:, None]
    sums = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    for step in range(STEPS):
        p = step * BLOCK_P + rows
        ok = (start + p < P) & (c < C)
        d = tl.load(x + (p * C + c), mask=ok, other=0.0).to(ACC) - shift
        sums += tl.where(ok, d, 0.0)
    count = tl.minimum(P - start, STEPS * BLOCK_P).to(ACC)
    mean = tl.sum(sums, axis=0)[None, :] / count
    squares = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    for step in range(STEPS):
        p = step * BLOCK_P + rows
        ok = (start + p < P) & (c < C)
        d = tl.load(x + (p * C + c), mask=ok, other=0.0).to(ACC) - shift - mean
        squares += tl.where(ok, d * d, 0.0)
    tl.store(_part(parts, 0, 2, task, c, C), mean, mask=c < C)
    tl.store(_part(parts, 1, 2, task, c, C), tl.sum(squares, axis=0)[None, :], mask=c < C)


@triton.jit(do_not_specialize=_SIZES)
def normalise_kernel(
    x, weight, bias, parts, y, mean_out, var_out, P, C,
    EPS: tl.constexpr, RELU: tl.constexpr, CHUNKS: tl.constexpr, STEPS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`y = relu?((x − mean) rstd γ + β)`, the chunks' statistics merged as Chan et al. do."""
    task, c, at, start, first = _place(P, C, STEPS, BLOCK_P, BLOCK_C)
    left = P - tl.arange(0, CHUNKS)[:, None] * (STEPS * BLOCK_P)
    counts = tl.maximum(tl.minimum(left, STEPS * BLOCK_P), 0).to(ACC)
    n = tl.full([1, 1], 0, ACC) + P
    means = _parts(parts, 0, 2, task, c, C, CHUNKS)
    mean = tl.sum(counts * means, axis=0)[None, :] / n
    between = tl.sum(counts * (means - mean) * (means - mean), axis=0)[None, :]
    mean += tl.load(x + task * P * C + c, mask=c < C, other=0.0).to(ACC)
    var = (_total(parts, 1, 2, task, c, C, CHUNKS) + between) / n
    rstd = tl.rsqrt(var + EPS)
    gamma = _channel(weight, at, c < C, 1.0, ACC, BLOCK_C)
    beta = _channel(bias, at, c < C, 0.0, ACC, BLOCK_C)
    rows = tl.arange(0, BLOCK_P)[:, None]
    for step in range(STEPS):
        p = step * BLOCK_P + rows
        ok = (start + p < P) & (c < C)
        b_x = tl.load(x + first + (p * C + c), mask=ok, other=0.0).to(ACC)
        z = (b_x - mean) * rstd * gamma + beta
        if RELU:
            z = tl.where(z < 0, 0.0, z)  # keeps NaN
        tl.store(y + first + (p * C + c), z.to(y.dtype.element_ty), mask=ok)
    if tl.program_id(0) == 0:
        tl.store(mean_out + at, mean, mask=c < C)
        tl.store(var_out + at, var, mask=c < C)


@triton.jit
def _normalised(
    dy, x, at, ok, mean, rstd, gamma, beta, RELU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x̂, and dz = dy where relu let z = γ x̂ + β through; dz is zero beyond the last row."""
    xhat = (tl.load(x + at, mask=ok, other=0.0).to(ACC) - mean) * rstd
    dz = tl.load(dy + at, mask=ok, other=0.0).to(ACC)
    if RELU:
        dz = tl.where(xhat * gamma + beta > 0, dz, 0.0)
    return xhat, dz


@triton.jit(do_not_specialize=_SIZES)
def backward_sums_kernel(
    dy, x, mean, rstd, weight, bias, parts, P, C,
    RELU: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Per chunk: Σ dz and Σ dz x̂."""
    task, c, at, start, first = _place(P, C, STEPS, BLOCK_P, BLOCK_C)
    mu = _channel(mean, at, c < C, 0.0, ACC, BLOCK_C)
    r = _channel(rstd, at, c < C, 0.0, ACC, BLOCK_C)
    gamma = _channel(weight, at, c < C, 1.0, ACC, BLOCK_C)
    beta = _channel(bias, at, c < C, 0.0, ACC, BLOCK_C)
    rows = tl.arange(0, BLOCK_P)[:, None]
    s1 = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    s2 = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    for step in range(STEPS):
        p = step * BLOCK_P + rows
        ok = (start + p < P) & (c < C)
        xhat, dz = _normalised(dy, x, first + (p * C + c), ok, mu, r, gamma, beta, RELU, ACC)
        s1 += dz
        s2 += dz * xhat
    tl.store(_part(parts, 0, 2, task, c, C), tl.sum(s1, axis=0)[None, :], mask=c < C)
    tl.store(_part(parts, 1, 2, task, c, C), tl.sum(s2, axis=0)[None, :], mask=c < C)


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    dy, x, mean, rstd, weight, bias, parts, dx, dweight, dbias, P, C,
    RELU: tl.constexpr, CHUNKS: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`dx = γ r (dz − s1/n − x̂ s2/n)`, `dγ = s2 = Σ dz x̂`, `dβ = s1 = Σ dz`."""
    task, c, at, start, first = _place(P, C, STEPS, BLOCK_P, BLOCK_C)
    mu = _channel(mean, at, c < C, 0.0, ACC, BLOCK_C)
    r = _channel(rstd, at, c < C, 0.0, ACC, BLOCK_C)
    gamma = _channel(weight, at, c < C, 1.0, ACC, BLOCK_C)
    beta = _channel(bias, at, c < C, 0.0, ACC, BLOCK_C)
    n = tl.full([1, 1], 0, ACC) + P
    s1 = _total(parts, 0, 2, task, c, C, CHUNKS)
    s2 = _total(parts, 1, 2, task, c, C, CHUNKS)
    rows = tl.arange(0, BLOCK_P)[:, None]
    for step in range(STEPS):
        p = step * BLOCK_P + rows
        ok = (start + p < P) & (c < C)
        xhat, dz = _normalised(dy, x, first + (p * C + c), ok, mu, r, gamma, beta, RELU, ACC)
        b_dx = gamma * r * (dz - s1 / n - xhat * (s2 / n))
        tl.store(dx + first + (p * C + c), b_dx.to(dx.dtype.element_ty), mask=ok)
    if tl.program_id(0) == 0:
        tl.store(dbias + at, s1.to(dbias.dtype.element_ty), mask=c < C)
        tl.store(dweight + at, s2.to(dweight.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=_SIZES)
def double_backward_sums_kernel(
    a, dy, x, mean, rstd, weight, bias, parts, P, C,
    RELU: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Per chunk: Σ dz, Σ dz x̂, Σ a, Σ a x̂ and Σ a dz."""
    task, c, at, start, first = _place(P, C, STEPS, BLOCK_P, BLOCK_C)
    mu = _channel(mean, at, c < C, 0.0, ACC, BLOCK_C)
    r = _channel(rstd, at, c < C, 0.0, ACC, BLOCK_C)
    gamma = _channel(weight, at, c < C, 1.0, ACC, BLOCK_C)
    beta = _channel(bias, at, c < C, 0.0, ACC, BLOCK_C)
    rows = tl.arange(0, BLOCK_P)[:, None]
    s1 = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    s2 = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    a1 = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    a2 = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    a3 = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    for step in range(STEPS):
        p = step * BLOCK_P + rows
        ok = (start + p < P) & (c < C)
        xhat, dz = _normalised(dy, x, first + (p * C + c), ok, mu, r, gamma, beta, RELU, ACC)
        b_a = tl.load(a + first + (p * C + c), mask=ok, other=0.0).to(ACC)
        s1 += dz
        s2 += dz * xhat
        a1 += b_a
        a2 += b_a * xhat
        a3 += b_a * dz
    tl.store(_part(parts, 0, 5, task, c, C), tl.sum(s1, axis=0)[None, :], mask=c < C)
    tl.store(_part(parts, 1, 5, task, c, C), tl.sum(s2, axis=0)[None, :], mask=c < C)
    tl.store(_part(parts, 2, 5, task, c, C), tl.sum(a1, axis=0)[None, :], mask=c < C)
    tl.store(_part(parts, 3, 5, task, c, C), tl.sum(a2, axis=0)[None, :], mask=c < C)
    tl.store(_part(parts, 4, 5, task, c, C), tl.sum(a3, axis=0)[None, :], mask=c < C)


@triton.jit(do_not_specialize=_SIZES)
def double_backward_kernel(
    a, b, cotangent_bias, dy, x, mean, rstd, weight, bias, parts, d_dy, dx, dweight, P, C,
    RELU: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr, STEPS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of <a, dx> + <b, dγ> + <c, dβ> in dy, x and γ; `norm.py` has the formulas."""
    task, c, at, start, first = _place(P, C, STEPS, BLOCK_P, BLOCK_C)
    mu = _channel(mean, at, c < C, 0.0, ACC, BLOCK_C)
    r = _channel(rstd, at, c < C, 0.0, ACC, BLOCK_C)
    gamma = _channel(weight, at, c < C, 1.0, ACC, BLOCK_C)
    beta = _channel(bias, at, c < C, 0.0, ACC, BLOCK_C)
    b_b = _channel(b, at, c < C, 0.0, ACC, BLOCK_C)
    b_c = _channel(cotangent_bias, at, c < C, 0.0, ACC, BLOCK_C)
    n = tl.full([1, 1], 0, ACC) + P
    s1 = _total(parts, 0, PARTS, task, c, C, CHUNKS)
    s2 = _total(parts, 1, PARTS, task, c, C, CHUNKS)
    a1 = tl.zeros([1, BLOCK_C], dtype=ACC)
    a2 = tl.zeros([1, BLOCK_C], dtype=ACC)
    a3 = tl.zeros([1, BLOCK_C], dtype=ACC)
    if a is not None:
        a1 += _total(parts, 2, PARTS, task, c, C, CHUNKS)
        a2 += _total(parts, 3, PARTS, task, c, C, CHUNKS)
        a3 += _total(parts, 4, PARTS, task, c, C, CHUNKS)
    inner = a3 - a1 * s1 / n - a2 * s2 / n
    scale = gamma * r
    mean_h = (b_b * s1 - scale * (a1 * s2 + s1 * a2) / n) / n
    mean_hx = (b_b * s2 - 2 * scale * a2 * s2 / n) / n
    slope = mean_hx * r + r * r * gamma * inner / n  # of x̂ in dx
    rows = tl.arange(0, BLOCK_P)[:, None]
    for step in range(STEPS):
        p = step * BLOCK_P + rows
        ok = (start + p < P) & (c < C)
        offset = first + (p * C + c)
        xhat, dz = _normalised(dy, x, offset, ok, mu, r, gamma, beta, RELU, ACC)
        d_dz = b_b * xhat + b_c
        h = b_b * dz
        if a is not None:
            b_a = tl.load(a + offset, mask=ok, other=0.0).to(ACC)
            d_dz += scale * (b_a - a1 / n - xhat * (a2 / n))
            h -= scale * (b_a * s2 + dz * a2) / n
        if RELU:
            d_dz = tl.where(xhat * gamma + beta > 0, d_dz, 0.0)
        b_dx = r * (h - mean_h) - xhat * slope
        tl.store(d_dy + offset, d_dz.to(d_dy.dtype.element_ty), mask=ok)
        tl.store(dx + offset, b_dx.to(dx.dtype.element_ty), mask=ok)
    if tl.program_id(0) == 0:
        tl.store(dweight + at, (r * inner).to(dweight.dtype.element_ty), mask=c < C)
