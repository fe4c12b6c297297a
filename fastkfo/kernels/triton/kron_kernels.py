"""The Kronecker update of one item and its derivatives: the kernels that `kron.py` launches.

A program has one task and STEPS tiles of its batch (`kron_blocks.py`). `t_x` leads from one task's
x to the next's, 0 if x is shared; such offsets take 64 bits. Sums over the batch leave one row per
program in `parts`, `[T, chunks, width]`: dA `[n, n]` first, dC `[m, m]` at `at_right`, dβ `[n, m]`
at `at_bias`, the number dS at `at_scale`. WANTED has the bits of csrc/library.cpp; a launch may
compute some of them. The formulas are those of fastkfo/reference/kron.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from fastkfo.kernels.triton import kron_blocks as blocks

# Neither sizes nor what leads from task to task is worth a kernel of its own.
_SIZES = [
    "t_param", "t_cotangent", "t_grad", "t_left", "t_right", "t_bias", "t_scale",
    "t_d_grad", "t_d_left", "t_d_right", "t_d_bias", "t_d_scale",
    "at_right", "at_bias", "at_scale", "width", "chunks", "B", "n", "m",
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def kron_forward_kernel(
    grad, left, right, bias, scale, param, out, alpha: tl.float64,
    t_grad, t_left, t_right, t_bias, t_scale, t_param, chunks, B, n, m,
    FULL: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Y = θ + α S ∘ (A G C + β)."""
    task = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    b_alpha = tl.full([1, 1], alpha, ACC)
    b_a = blocks.matrix(left, task * t_left, n, n, N, N, ACC)
    b_c = blocks.matrix(right, task * t_right, m, m, M, M, ACC)
    for step in range(STEPS):
        first, at, ok = blocks.tile(chunk, step, B, n, m, STEPS, N, M, BLOCK_B)
        b_y = tl.load(grad + task * t_grad + first + at, mask=ok, other=0.0).to(ACC)
        if right is not None:
            b_y = blocks.right_product(b_y, b_c, N, M, BLOCK_B, PRECISION, ACC)
        if left is not None:
            b_y = blocks.left_product(b_a, b_y, N, PRECISION, ACC)
        if bias is not None:
            b_y += blocks.bias_of(bias, task * t_bias, n, m, N, M, BLOCK_B, ACC)
        b_y = b_alpha * blocks.scale_of(scale, task * t_scale, first, at, ok, FULL, ACC) * b_y
        if param is not None:
            b_y += tl.load(param + task * t_param + first + at, mask=ok, other=0.0).to(ACC)
        to = out + task * B * (n * m) + first + at
        tl.store(to, b_y.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=_SIZES)
def kron_backward_kernel(
    cotangent, grad, left, right, bias, scale, to_grad, to_scale, parts, alpha: tl.float64,
    t_cotangent, t_grad, t_left, t_right, t_bias, t_scale,
    at_right, at_bias, at_scale, width, chunks, B, n, m,
    WANTED: tl.constexpr, FULL: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The vector-Jacobian product of kron_forward_kernel.

    With W = α S ∘ V, P = G C, Z = Aᵀ W: dG = Z Cᵀ, the sums over the batch dA = Σ W Pᵀ,
    dC = Σ Gᵀ Z, dβ = Σ W, and dS = α V ∘ (A P + β), summed where S is one number.
    """
    task = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    b_alpha = tl.full([1, 1], alpha, ACC)
    b_a = blocks.matrix(left, task * t_left, n, n, N, N, ACC)
    b_c = blocks.matrix(right, task * t_right, m, m, M, M, ACC)
    acc_a = tl.zeros([N, N], dtype=ACC)
    acc_c = tl.zeros([M, M], dtype=ACC)
    acc_bias = tl.zeros([N, BLOCK_B * M], dtype=ACC)
    acc_scale = tl.zeros([N, BLOCK_B * M], dtype=ACC)
    for step in range(STEPS):
        first, at, ok = blocks.tile(chunk, step, B, n, m, STEPS, N, M, BLOCK_B)
        to = task * B * (n * m) + first + at
        b_v = b_alpha * tl.load(cotangent + task * t_cotangent + first + at, mask=ok, other=0.0).to(
            ACC
        )
        b_w = blocks.scale_of(scale, task * t_scale, first, at, ok, FULL, ACC) * b_v
        if WANTED & 8:
            acc_bias += b_w
        if WANTED & 22:
            b_g = tl.load(grad + task * t_grad + first + at, mask=ok, other=0.0).to(ACC)
        if WANTED & 18:
            b_p = b_g
            if right is not None:
                b_p = blocks.right_product(b_p, b_c, N, M, BLOCK_B, PRECISION, ACC)
            if WANTED & 2:
                acc_a = blocks.add_left(acc_a, b_w, b_p, N, PRECISION, ACC)
            if WANTED & 16:
                b_y = b_p
                if left is not None:
                    b_y = blocks.left_product(b_a, b_p, N, PRECISION, ACC)
                if bias is not None:
                    b_y += blocks.bias_of(bias, task * t_bias, n, m, N, M, BLOCK_B, ACC)
                if FULL:
                    tl.store(to_scale + to, (b_v * b_y).to(to_scale.dtype.element_ty), mask=ok)
                else:
                    acc_scale += b_v * b_y
        if WANTED & 5:
            b_z = b_w
            if left is not None:
                b_z = blocks.left_product(tl.trans(b_a), b_w, N, PRECISION, ACC)
            if WANTED & 4:
                acc_c = blocks.add_right(acc_c, b_g, b_z, N, M, BLOCK_B, PRECISION, ACC)
            if WANTED & 1:
                if right is not None:
                    b_z = blocks.right_product(b_z, tl.trans(b_c), N, M, BLOCK_B, PRECISION, ACC)
                tl.store(to_grad + to, b_z.to(to_grad.dtype.element_ty), mask=ok)
    row = parts + (task * chunks + chunk) * width
    blocks.store_sums(
        row, acc_a, acc_c, acc_bias, acc_scale, at_right, at_bias, at_scale, n, m,
        WANTED, FULL, N, M, BLOCK_B,
    )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def kron_double_backward_kernel(
    cotangent, grad, left, right, bias, scale, d_grad, d_left, d_right, d_bias, d_scale,
    to_grad, to_scale, to_cotangent, parts, alpha: tl.float64,
    t_cotangent, t_grad, t_left, t_right, t_bias, t_scale,
    t_d_grad, t_d_left, t_d_right, t_d_bias, t_d_scale,
    at_right, at_bias, at_scale, width, chunks, B, n, m,
    WANTED: tl.constexpr, FULL: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The tangent of kron_backward_kernel along d, and that of Y (to_cotangent).

    A `d` marks a tangent: dW = α dS ∘ V, dP = dG C + G dC, dY = dA P + A dP + dβ,
    dZ = dAᵀ W + Aᵀ dW.
    """
    task = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    b_alpha = tl.full([1, 1], alpha, ACC)
    b_a = blocks.matrix(left, task * t_left, n, n, N, N, ACC)
    b_c = blocks.matrix(right, task * t_right, m, m, M, M, ACC)
    b_da = blocks.matrix(d_left, task * t_d_left, n, n, N, N, ACC)
    b_dc = blocks.matrix(d_right, task * t_d_right, m, m, M, M, ACC)
    acc_a = tl.zeros([N, N], dtype=ACC)
    acc_c = tl.zeros([M, M], dtype=ACC)
    acc_bias = tl.zeros([N, BLOCK_B * M], dtype=ACC)
    acc_scale = tl.zeros([N, BLOCK_B * M], dtype=ACC)
    for step in range(STEPS):
        first, at, ok = blocks.tile(chunk, step, B, n, m, STEPS, N, M, BLOCK_B)
        to = task * B * (n * m) + first + at
        b_v = b_alpha * tl.load(cotangent + task * t_cotangent + first + at, mask=ok, other=0.0).to(
            ACC
        )
        b_s = blocks.scale_of(scale, task * t_scale, first, at, ok, FULL, ACC)
        b_g = tl.load(grad + task * t_grad + first + at, mask=ok, other=0.0).to(ACC)
        b_w = b_s * b_v
        if d_scale is not None:
            b_ds = blocks.scale_of(d_scale, task * t_d_scale, first, at, ok, FULL, ACC)
            b_dw = b_ds * b_v
            if WANTED & 8:
                acc_bias += b_dw

        if WANTED & 50:
            b_p = b_g
            if right is not None:
                b_p = blocks.right_product(b_g, b_c, N, M, BLOCK_B, PRECISION, ACC)
            b_dp = tl.zeros([N, BLOCK_B * M], dtype=ACC)
            if d_grad is not None:
                b_dg = tl.load(d_grad + task * t_d_grad + first + at, mask=ok, other=0.0).to(ACC)
                b_dp = b_dg
                if right is not None:
                    b_dp = blocks.right_product(b_dg, b_c, N, M, BLOCK_B, PRECISION, ACC)
            if d_right is not None:
                b_dp += blocks.right_product(b_g, b_dc, N, M, BLOCK_B, PRECISION, ACC)
            if WANTED & 2:
                acc_a = blocks.add_left(acc_a, b_w, b_dp, N, PRECISION, ACC)
                if d_scale is not None:
                    acc_a = blocks.add_left(acc_a, b_dw, b_p, N, PRECISION, ACC)
            if WANTED & 48:
                b_dy = b_dp
                if left is not None:
                    b_dy = blocks.left_product(b_a, b_dp, N, PRECISION, ACC)
                if d_left is not None:
                    b_dy += blocks.left_product(b_da, b_p, N, PRECISION, ACC)
                if d_bias is not None:
                    b_dy += blocks.bias_of(d_bias, task * t_d_bias, n, m, N, M, BLOCK_B, ACC)
                if WANTED & 16:
                    if FULL:
                        b_to = (b_v * b_dy).to(to_scale.dtype.element_ty)
                        tl.store(to_scale + to, b_to, mask=ok)
                    else:
                        acc_scale += b_v * b_dy
                if WANTED & 32:
                    b_dy = b_alpha * b_s * b_dy
                    if d_scale is not None:
                        b_y = b_p
                        if left is not None:
                            b_y = blocks.left_product(b_a, b_p, N, PRECISION, ACC)
                        if bias is not None:
                            b_y += blocks.bias_of(bias, task * t_bias, n, m, N, M, BLOCK_B, ACC)
                        b_dy += b_alpha * b_ds * b_y
                    b_to = b_dy.to(to_cotangent.dtype.element_ty)
                    tl.store(to_cotangent + to, b_to, mask=ok)

        if WANTED & 5:
            b_z = b_w
            if left is not None:
                b_z = blocks.left_product(tl.trans(b_a), b_w, N, PRECISION, ACC)
            b_dz = tl.zeros([N, BLOCK_B * M], dtype=ACC)
            if d_scale is not None:
                b_dz = b_dw
                if left is not None:
                    b_dz = blocks.left_product(tl.trans(b_a), b_dw, N, PRECISION, ACC)
            if d_left is not None:
                b_dz += blocks.left_product(tl.trans(b_da), b_w, N, PRECISION, ACC)
            if WANTED & 4:
                acc_c = blocks.add_right(acc_c, b_g, b_dz, N, M, BLOCK_B, PRECISION, ACC)
                if d_grad is not None:
                    b_dg = tl.load(d_grad + task * t_d_grad + first + at, mask=ok, other=0.0)
                    acc_c = blocks.add_right(
                        acc_c, b_dg.to(ACC), b_z, N, M, BLOCK_B, PRECISION, ACC
                    )
            if WANTED & 1:
                if right is not None:
                    b_dz = blocks.right_product(b_dz, tl.trans(b_c), N, M, BLOCK_B, PRECISION, ACC)
                if d_right is not None:
                    b_dz += blocks.right_product(b_z, tl.trans(b_dc), N, M, BLOCK_B, PRECISION, ACC)
                tl.store(to_grad + to, b_dz.to(to_grad.dtype.element_ty), mask=ok)
    row = parts + (task * chunks + chunk) * width
    blocks.store_sums(
        row, acc_a, acc_c, acc_bias, acc_scale, at_right, at_bias, at_scale, n, m,
        WANTED, FULL, N, M, BLOCK_B,
    )  # fmt: skip
