"""Pooling: the kernels that `pool.py` launches.

Axes of every grid: blocks of the output's pixels, blocks of channels, tasks. Images are
`[T, N, H, W, C]` and `[T, N, OH, OW, C]`; an offset within one takes 32 bits, what leads to it 64.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

# Sizes that change from call to call: no kernel is compiled anew for a size of one or a multiple of
# 16 among them.
_SIZES = ["N", "H", "W", "OH", "OW", "pad_h", "pad_w", "divisor"]


@triton.jit
def _place(N, H, W, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of this program: image, row and column of its pixels, its channels, and which there are."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    image = tl.program_id(2).to(tl.int64) * N + p // (H * W)
    rest = p % (H * W)
    return image, rest // W, rest % W, c, (p < N * H * W) & (c < C)


@triton.jit
def _window(at, tap, stride, pad, dil, SIZE):
    """Of the windows that have the pixel `at` as this tap, the index, and whether there is one."""
    start = at + pad - tap * dil
    return start // stride, (start >= 0) & (start % stride == 0) & (start // stride < SIZE)


@triton.jit(do_not_specialize=_SIZES)
def max_pool_kernel(
    x, y, where, N, H, W, OH, OW, C, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    KH: tl.constexpr, KW: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[q] = max x[p] over the window q, where[q] = the first such p."""
    image, oh, ow, c, ok = _place(N, OH, OW, C, BLOCK_P, BLOCK_C)
    best = tl.full([BLOCK_P, BLOCK_C], float("-inf"), ACC)
    index = tl.full([BLOCK_P, BLOCK_C], -1, tl.int32)
    x += image * (H * W * C)
    for tap in range(KH * KW):
        h = oh * stride_h - pad_h + (tap // KW) * dil_h
        w = ow * stride_w - pad_w + (tap % KW) * dil_w
        inside = ok & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        v = tl.load(x + ((h * W + w) * C + c), mask=inside, other=0.0).to(ACC)
        # The first pixel even if it is -inf; a later NaN even after a NaN, as PyTorch has it.
        wins = inside & ((v > best) | (v != v) | (index < 0))
        best = tl.where(wins, v, best)
        index = tl.where(wins, h * W + w, index)
    at = image * (OH * OW * C) + ((oh * OW + ow) * C + c)
    tl.store(y + at, best.to(y.dtype.element_ty), mask=ok)
    tl.store(where + at, index, mask=ok)


@triton.jit(do_not_specialize=_SIZES)
def max_pool_scatter_kernel(
    dy, where, dx, N, H, W, OH, OW, C, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    KH: tl.constexpr, KW: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx[p] = Σ dy[q] over all windows q with where[q] = p."""
    image, h, w, c, ok = _place(N, H, W, C, BLOCK_P, BLOCK_C)
    acc = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    for tap in range(KH * KW):
        oh, has_h = _window(h, tap // KW, stride_h, pad_h, dil_h, OH)
        ow, has_w = _window(w, tap % KW, stride_w, pad_w, dil_w, OW)
        inside = ok & has_h & has_w
        at = image * (OH * OW * C) + ((oh * OW + ow) * C + c)
        chosen = inside & (tl.load(where + at, mask=inside, other=-1) == h * W + w)
        acc += tl.load(dy + at, mask=chosen, other=0.0).to(ACC)
    at = image * (H * W * C) + ((h * W + w) * C + c)
    tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=_SIZES)
def max_pool_gather_kernel(
    v, where, y, N, H, W, OH, OW, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[q] = v[where[q]]."""
    image, oh, ow, c, ok = _place(N, OH, OW, C, BLOCK_P, BLOCK_C)
    at = image * (OH * OW * C) + ((oh * OW + ow) * C + c)
    index = tl.load(where + at, mask=ok, other=-1)
    found = tl.load(v + image * (H * W * C) + (index * C + c), mask=ok & (index >= 0), other=0.0)
    tl.store(y + at, found, mask=ok)


@triton.jit
def _divisor(
    oh, ow, H, W, stride_h, stride_w, pad_h, pad_w, divisor,
    KH: tl.constexpr, KW: tl.constexpr, INCLUDE_PAD: tl.constexpr,
):  # fmt: skip
    """What the sum of a window is divided by; at least one, where there is no window."""
    top, left = oh * stride_h - pad_h, ow * stride_w - pad_w
    bottom, right = tl.minimum(top + KH, H + pad_h), tl.minimum(left + KW, W + pad_w)
    if not INCLUDE_PAD:
        top, left = tl.maximum(top, 0), tl.maximum(left, 0)
        bottom, right = tl.minimum(bottom, H), tl.minimum(right, W)
    size = tl.maximum(bottom - top, 1) * tl.maximum(right - left, 1)
    return tl.where(divisor != 0, divisor, size)


@triton.jit(do_not_specialize=_SIZES)
def avg_pool_kernel(
    x, y, N, H, W, OH, OW, C, stride_h, stride_w, pad_h, pad_w, divisor,
    KH: tl.constexpr, KW: tl.constexpr, INCLUDE_PAD: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y[q] = Σ x[p] over the window q, divided by its divisor."""
    image, oh, ow, c, ok = _place(N, OH, OW, C, BLOCK_P, BLOCK_C)
    acc = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    x += image * (H * W * C)
    for tap in range(KH * KW):
        h = oh * stride_h - pad_h + tap // KW
        w = ow * stride_w - pad_w + tap % KW
        inside = ok & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        acc += tl.load(x + ((h * W + w) * C + c), mask=inside, other=0.0).to(ACC)
    d = _divisor(oh, ow, H, W, stride_h, stride_w, pad_h, pad_w, divisor, KH, KW, INCLUDE_PAD)
    at = image * (OH * OW * C) + ((oh * OW + ow) * C + c)
    tl.store(y + at, (acc / d.to(ACC)).to(y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=_SIZES)
def avg_pool_backward_kernel(
    dy, dx, N, H, W, OH, OW, C, stride_h, stride_w, pad_h, pad_w, divisor,
    KH: tl.constexpr, KW: tl.constexpr, INCLUDE_PAD: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx[p] = Σ dy[q] / divisor[q] over all windows q that have p."""
    image, h, w, c, ok = _place(N, H, W, C, BLOCK_P, BLOCK_C)
    acc = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
    for tap in range(KH * KW):
        oh, has_h = _window(h, tap // KW, stride_h, pad_h, 1, OH)
        ow, has_w = _window(w, tap % KW, stride_w, pad_w, 1, OW)
        at = image * (OH * OW * C) + ((oh * OW + ow) * C + c)
        b_dy = tl.load(dy + at, mask=ok & has_h & has_w, other=0.0).to(ACC)
        d = _divisor(oh, ow, H, W, stride_h, stride_w, pad_h, pad_w, divisor, KH, KW, INCLUDE_PAD)
        acc += b_dy / d.to(ACC)
    at = image * (H * W * C) + ((h * W + w) * C + c)
    tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=ok)
