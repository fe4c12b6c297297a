"""Convolution as implicit products of matrices: the kernels that `conv.py` launches.

Axes of every grid: tiles, groups, tasks. CI and CO are the input and output channels of one group;
a "tap" is a position in the window. Blocks are two-dimensional from the start, `[BLOCK, 1]` or
`[1, BLOCK]`. An offset within one image takes 32 bits, what leads to an image 64.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

# Sizes that change from call to call: no kernel is compiled anew for a size of one or a multiple of
# 16 among them. Strides and dilations are specialised, since those of one cost no division then.
_SIZES = ["N", "H", "W", "OH", "OW", "pad_h", "pad_w", "total"]


@triton.jit
def _terms(step, k, C: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """Tap and channel of the terms k of one step of a sum over taps and channels."""
    if FLAT:  # taps and channels are one axis, for few channels; else a step has a single tap
        term = step * BLOCK + k
        tap = term // C
        channel = term % C
        ok = term < TAPS * C
    else:
        tap = step // ((C + BLOCK - 1) // BLOCK)
        channel = (step % ((C + BLOCK - 1) // BLOCK)) * BLOCK + k
        ok = channel < C
    return tap, channel, ok


@triton.jit
def _pixels(p, H, W):
    """Sample, row and column of the pixels p of a task."""
    image = p // (H * W)
    rest = p % (H * W)
    return image, rest // W, rest % W


@triton.jit
def _add_conv(
    acc, x, weight, image, top, left, p_ok, o, o_ok, H, W, row, dil_h, dil_w,
    CI: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STEPS: tl.constexpr, FLAT: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc[p, o] += Σ_{tap, c} x[p at tap, c] weight[o, c, tap]."""
    k = tl.arange(0, BLOCK_K)
    for step in range(STEPS):
        tap, c, ok = _terms(step, k[None, :], CI, KH * KW, BLOCK_K, FLAT)
        h = top + (tap // KW) * dil_h  # [BLOCK_P, 1 or BLOCK_K]
        w = left + (tap % KW) * dil_w
        ok = ok & p_ok & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        b_x = tl.load(x + image + ((h * W + w) * row + c), mask=ok, other=0.0)
        tap, c, ok = _terms(step, k[:, None], CI, KH * KW, BLOCK_K, FLAT)
        at = o * (CI * KH * KW) + (c * (KH * KW) + tap)
        b_w = tl.load(weight + at, mask=ok & o_ok, other=0.0)  # [BLOCK_K, BLOCK_O]
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit(do_not_specialize=_SIZES)
def conv_kernel(
    x, weight, bias, x2, weight2, y, N, H, W, OH, OW, CO,
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    CI: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STEPS: tl.constexpr, FLAT: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[p, o] = Σ_{tap, c} (x[p at tap, c] w[o, c, tap] + x2 w2) + bias[o], a tile [P, CO] each."""
    task, group, groups = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    o_blocks = tl.cdiv(CO, BLOCK_O)
    p = (tl.program_id(0) // o_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    o = (tl.program_id(0) % o_blocks) * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
    p_ok, o_ok = p < N * OH * OW, o < CO
    n, top, left = _pixels(p, OH, OW)
    top = top * stride_h - pad_h
    left = left * stride_w - pad_w
    row = groups * CI
    image = (task * N + n) * (H * W * row) + group * CI
    first = (task * groups + group) * CO
    weights = first * (CI * KH * KW)
    acc = tl.zeros([BLOCK_P, BLOCK_O], dtype=ACC)
    acc = _add_conv(
        acc, x, weight + weights, image, top, left, p_ok, o, o_ok, H, W, row, dil_h, dil_w,
        CI, KH, KW, STEPS, FLAT, PRECISION, ACC, BLOCK_K,
    )  # fmt: skip
    if x2 is not None:
        acc = _add_conv(
            acc, x2, weight2 + weights, image, top, left, p_ok, o, o_ok, H, W, row, dil_h, dil_w,
            CI, KH, KW, STEPS, FLAT, PRECISION, ACC, BLOCK_K,
        )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + first + o, mask=o_ok, other=0.0).to(ACC)
    at = (task * (N * OH * OW) + p) * (groups * CO) + group * CO + o
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=p_ok & o_ok)


@triton.jit(do_not_specialize=_SIZES)
def conv_input_kernel(
    dy, weight, dx, N, H, W, OH, OW, CI,
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    CO: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    EVERY_H: tl.constexpr, EVERY_W: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    STEPS: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx[p, c] = Σ_{tap, o} dy[the q whose tap is p, o] w[o, c, tap], a tile [P, CI] each.

    Pixels of one tile are alike modulo the stride, so that of a dense window only every EVERY-th
    tap, TAPS of them, can contribute.
    """
    task, group, groups = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    c_blocks = tl.cdiv(CI, BLOCK_C)
    tile = tl.program_id(0) // c_blocks
    c = (tl.program_id(0) % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    phase = tile % (stride_h * stride_w)
    phase_h, phase_w = phase // stride_w, phase % stride_w
    count_h = tl.cdiv(H - phase_h, stride_h)  # zero where the image is smaller than the stride
    count_w = tl.cdiv(W - phase_w, stride_w)
    p = (tile // (stride_h * stride_w)) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    p_ok, c_ok = p < N * count_h * count_w, c < CI
    n, top, left = _pixels(p, tl.maximum(count_h, 1), tl.maximum(count_w, 1))
    top = top * stride_h + phase_h
    left = left * stride_w + phase_w
    pixel = top * W + left
    top += pad_h
    left += pad_w
    row = groups * CO
    image = (task * N + n) * (OH * OW * row) + group * CO
    weight += (task * groups + group) * CO * (CI * KH * KW)
    acc = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    k = tl.arange(0, BLOCK_K)
    for step in range(STEPS):
        tap, o, ok = _terms(step, k[None, :], CO, TAPS_H * TAPS_W, BLOCK_K, FLAT)
        kh = (phase_h + pad_h) % EVERY_H + (tap // TAPS_W) * EVERY_H
        kw = (phase_w + pad_w) % EVERY_W + (tap % TAPS_W) * EVERY_W
        h = top - kh * dil_h
        w = left - kw * dil_w
        ok = ok & p_ok & (kh < KH) & (kw < KW) & (h >= 0) & (w >= 0)
        ok = ok & (h % stride_h == 0) & (w % stride_w == 0)
        h = h // stride_h
        w = w // stride_w
        ok = ok & (h < OH) & (w < OW)
        b_y = tl.load(dy + image + ((h * OW + w) * row + o), mask=ok, other=0.0)
        tap, o, ok = _terms(step, k[:, None], CO, TAPS_H * TAPS_W, BLOCK_K, FLAT)
        kh = (phase_h + pad_h) % EVERY_H + (tap // TAPS_W) * EVERY_H
        kw = (phase_w + pad_w) % EVERY_W + (tap % TAPS_W) * EVERY_W
        at = (o * CI + c) * (KH * KW) + (kh * KW + kw)
        ok = ok & c_ok & (kh < KH) & (kw < KW)
        b_w = tl.load(weight + at, mask=ok, other=0.0)  # [BLOCK_K, BLOCK_C]
        acc = tl.dot(b_y, b_w, acc, input_precision=PRECISION, out_dtype=ACC)
    at = ((task * N + n) * (H * W) + pixel) * (groups * CI) + group * CI + c
    tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=p_ok & c_ok)


@triton.jit(do_not_specialize=_SIZES)
def conv_weight_kernel(
    x, dy, out, N, H, W, OH, OW, CO, total,
    stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    CI: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, COLUMNS: tl.constexpr,
    FLAT: tl.constexpr, BIAS: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dw[o, c, tap] = Σ_p dy[p, o] x[p at tap, c], db[o] = Σ_p dy[p, o]; tiles [CO, (tap, c)].

    The pixels are shared among programs, STEPS blocks each; their parts lie `total` apart in `out`.
    Of one part, the dw of all tasks come first, then the db.
    """
    task, group, groups = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    column = tl.program_id(0) % COLUMNS
    o_blocks = tl.cdiv(CO, BLOCK_O)
    o = (tl.program_id(0) // COLUMNS) % o_blocks * BLOCK_O + tl.arange(0, BLOCK_O)[:, None]
    split = tl.program_id(0) // (COLUMNS * o_blocks)
    tap, c, k_ok = _terms(column, tl.arange(0, BLOCK_K)[None, :], CI, KH * KW, BLOCK_K, FLAT)
    o_ok = o < CO
    down = (tap // KW) * dil_h - pad_h
    right = (tap % KW) * dil_w - pad_w
    pixels = N * OH * OW
    x += task * N * (H * W * groups * CI) + group * CI
    dy += task * pixels * (groups * CO) + group * CO
    start = split * (STEPS * BLOCK_P)
    acc = tl.zeros([BLOCK_O, BLOCK_K], dtype=ACC)
    for step in range(STEPS):
        p = start + step * BLOCK_P + tl.arange(0, BLOCK_P)
        at = p[None, :].to(tl.int64) * (groups * CO) + o
        b_y = tl.load(dy + at, mask=o_ok & (p[None, :] < pixels), other=0.0)  # [BLOCK_O, BLOCK_P]
        p = p[:, None]
        n, h, w = _pixels(p, OH, OW)
        h = h * stride_h + down
        w = w * stride_w + right
        ok = k_ok & (p < pixels) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        image = n.to(tl.int64) * (H * W * groups * CI)
        b_x = tl.load(x + image + ((h * W + w) * (groups * CI) + c), mask=ok, other=0.0)
        acc = tl.dot(b_y, b_x, acc, input_precision=PRECISION, out_dtype=ACC)
    out += split.to(tl.int64) * total
    first = (task * groups + group) * CO
    at = (first + o) * (CI * KH * KW) + (c * (KH * KW) + tap)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=o_ok & k_ok)
    if BIAS and column == 0:
        sums = tl.zeros([BLOCK_O, BLOCK_P], dtype=ACC)
        for step in range(STEPS):
            p = start + step * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
            b_at = p.to(tl.int64) * (groups * CO) + o
            sums += tl.load(dy + b_at, mask=o_ok & (p < pixels), other=0.0).to(ACC)
        place = tl.num_programs(2).to(tl.int64) * (groups * CO) * (CI * KH * KW) + first + o
        db = tl.sum(sums, axis=1)[:, None]
        tl.store(out + place, db.to(out.dtype.element_ty), mask=o_ok)
