"""The Kronecker update of every parameter of a learner, and its derivatives: the raw ops.

A launch per item, over tasks and chunks of the batch; where factors are multiplied, a derivative
has up to five, since what all results are made of is too much for a program's registers. Then up to
two sums of partial results. Which shapes operands may have, `kron_item.py` says. Matrices larger
than a program holds (`kron_plan.py`) go by the formula, whose products are cuBLAS's or rocBLAS's
(`kron_formula.py`). float32 is multiplied as exactly as by plain float32 arithmetic
(`launch.precision`) unless `torch.backends.cuda.matmul` allows TF32; what is between two products
stays in float32 (float64 for float64) in every dtype. Every op is deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkfo.kernels.triton import kron_formula as formula
from fastkfo.kernels.triton import kron_kernels as kernels
from fastkfo.kernels.triton import launch
from fastkfo.kernels.triton.kron_item import (
    BIAS,
    COTANGENT,
    GRAD,
    LEFT,
    NAMED,
    RIGHT,
    SCALE,
    Group,
    Item,
    bits,
    items,
)
from fastkfo.kernels.triton.kron_plan import plan_of


def kron_forward(
    grads: Sequence[Tensor],
    left: Group,
    right: Group,
    bias: Group,
    scale: Group,
    params: Group,
    dims: Sequence[int],
    alpha: Sequence[float],
) -> list[Tensor]:
    """`Y = θ + α S ∘ (A G C + β)` of every item.

    Args:
        grads: G, `[T, B, n, m]`.
        left: A, `[T?, n, n]`; None for the identity, an empty list for None everywhere.
        right: C, `[T?, m, m]`, likewise.
        bias: β, `[T?, n, m]`, None for zero.
        scale: S, of G's shape, one number, or `[T, 1, 1, 1]`; None for one.
        params: θ, of G's shape; None for zero.
        dims: T, B, n, m of every item.
        alpha: α of every item.

    Returns:
        Y of every item, in G's shape and dtype.
    """
    groups = _groups(grads, left, right, bias, scale, params=params)
    return [_forward(item) for item in items(groups, dims, alpha)]


def kron_backward(
    cotangents: Sequence[Tensor],
    grads: Sequence[Tensor],
    left: Group,
    right: Group,
    bias: Group,
    scale: Group,
    dims: Sequence[int],
    alpha: Sequence[float],
    wanted: Sequence[int],
) -> list[Tensor]:
    """The vector-Jacobian product of `kron_forward`.

    With W = α S ∘ V, P = G C and Z = Aᵀ W: `dG = Z Cᵀ`, `dA = Σ W Pᵀ`, `dC = Σ Gᵀ Z`, `dβ = Σ W`,
    `dS = α V ∘ (A P + β)`, summed over what shares an operand.

    Args:
        cotangents: V, of G's shape.
        grads: as in `kron_forward`.
        left: as in `kron_forward`.
        right: as in `kron_forward`.
        bias: as in `kron_forward`.
        scale: as in `kron_forward`.
        dims: as in `kron_forward`.
        alpha: as in `kron_forward`.
        wanted: of every item the sum of 1 for dG, 2 dA, 4 dC, 8 dβ, 16 dS.

    Returns:
        What is wanted, item by item in the order of the bits, each of its operand's shape.
    """
    groups = _groups(grads, left, right, bias, scale, cotangents=cotangents)
    return [
        result
        for item in items(groups, dims, alpha, wanted)
        for result in _derivative("kron_backward", item)
    ]


def kron_double_backward(
    cotangents: Sequence[Tensor],
    grads: Sequence[Tensor],
    left: Group,
    right: Group,
    bias: Group,
    scale: Group,
    d_grads: Group,
    d_left: Group,
    d_right: Group,
    d_bias: Group,
    d_scale: Group,
    dims: Sequence[int],
    alpha: Sequence[float],
    wanted: Sequence[int],
) -> list[Tensor]:
    """The vector-Jacobian product of `kron_backward`; fastkfo/reference/kron.py has the formula.

    Args:
        cotangents: as in `kron_backward`.
        grads: as in `kron_forward`.
        left: as in `kron_forward`.
        right: as in `kron_forward`.
        bias: as in `kron_forward`.
        scale: as in `kron_forward`.
        d_grads: the cotangents of dG, of G's shape; None for zero.
        d_left: of dA, likewise.
        d_right: of dC.
        d_bias: of dβ.
        d_scale: of dS.
        dims: as in `kron_forward`.
        alpha: as in `kron_forward`.
        wanted: as in `kron_backward`; 32 for V.

    Returns:
        What is wanted, item by item in the order of the bits, each of its operand's shape.
    """
    groups = _groups(grads, left, right, bias, scale, cotangents=cotangents) | {
        "d_grads": d_grads, "d_left": d_left, "d_right": d_right, "d_bias": d_bias,
        "d_scale": d_scale,
    }  # fmt: skip
    return [
        result
        for item in items(groups, dims, alpha, wanted)
        for result in _derivative("kron_double_backward", item)
    ]


def _groups(
    grads: Group, left: Group, right: Group, bias: Group, scale: Group, **more: Group
) -> dict[str, Group]:
    return {"grads": grads, "left": left, "right": right, "bias": bias, "scale": scale, **more}


def _forward(item: Item) -> Tensor:
    grad = item.given["grads"]
    out = grad.new_empty(grad.shape)
    if out.numel() == 0:
        return out
    plan = plan_of("kron_forward", item)
    if plan is None:
        return out.copy_(formula.forward(item).reshape(grad.shape))
    operands = [item.x[x] for x in ("grads", "left", "right", "bias", "scale", "params")]
    plan.run(
        kernels.kron_forward_kernel, item, *(x.data for x in operands), out, item.alpha,
        *(x.stride for x in operands),
    )  # fmt: skip
    return out


# The kernel, its operands, what it writes element by element, what each launch computes, and the
# formula.
_DERIVATIVES = {
    "kron_backward": (
        kernels.kron_backward_kernel,
        ("cotangents", "grads", "left", "right", "bias", "scale"),
        (GRAD, SCALE),
        (GRAD | BIAS, LEFT, RIGHT, SCALE),
        formula.backward,
    ),
    "kron_double_backward": (
        kernels.kron_double_backward_kernel,
        (
            "cotangents", "grads", "left", "right", "bias", "scale",
            "d_grads", "d_left", "d_right", "d_bias", "d_scale",
        ),
        (GRAD, SCALE, COTANGENT),
        (GRAD, LEFT | BIAS, RIGHT, SCALE, COTANGENT),
        formula.double_backward,
    ),
}  # fmt: skip


def _derivative(op: str, item: Item) -> list[Tensor]:
    """What is wanted of an item by `kron_backward` or `kron_double_backward`."""
    kernel, names, elementwise, launches, by_formula = _DERIVATIVES[op]
    wanted, grad = bits(item.wanted), item.given["grads"]
    if grad.numel() == 0:
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in
                (item.given[NAMED[bit]] for bit in wanted)]  # fmt: skip
    if not wanted:
        return []
    plan = plan_of(op, item)
    if plan is None:
        results = by_formula(item)
        return [_shaped(item, bit, results[bit]) for bit in wanted]
    full = {
        bit: grad.new_empty(item.dims, dtype=_kept(item, bit))
        for bit in elementwise
        if bit in wanted and (bit != SCALE or item.full)
    }
    places, width = _places(item, [bit for bit in wanted if bit not in full])
    parts = grad.new_empty(item.dims[0], plan.chunks, width, dtype=launch.accumulator(grad.dtype))
    operands = [item.x[name] for name in names]
    for at_once in launches if plan.products else (item.wanted,):
        if item.wanted & at_once:
            plan.run(
                kernel, item, *(x.data for x in operands),
                *(full.get(bit) for bit in elementwise), parts, item.alpha,
                *(x.stride for x in operands),
                *(places.get(bit, 0) for bit in (RIGHT, BIAS, SCALE)), width,
                WANTED=item.wanted & at_once,
            )  # fmt: skip
    sums = _Sums(parts)
    return [
        _shaped(item, bit, full[bit]) if bit in full else sums.of(item, bit, places[bit])
        for bit in wanted
    ]


def _kept(item: Item, bit: int) -> torch.dtype:
    """The dtype of a gradient that a kernel writes whole: it may have to be summed over tasks."""
    dtype = item.given["grads"].dtype
    return launch.accumulator(dtype) if item.shared(bit) else dtype


def _places(item: Item, wanted: list[int]) -> tuple[dict[int, int], int]:
    """Where in a row of the parts each sum begins, and the width of a row."""
    places, width = {}, 0
    for bit in wanted:
        places[bit] = width
        width += item.size(bit)
    return places, width


class _Sums:
    """The parts, added up in a fixed order once or twice: over chunks, and over tasks as well."""

    def __init__(self, parts: Tensor) -> None:
        self.parts = parts
        self.done: dict[bool, Tensor] = {}

    def of(self, item: Item, bit: int, place: int) -> Tensor:
        """The gradient that begins at a place of the rows."""
        shared, like = item.shared(bit), item.given[NAMED[bit]]
        if shared not in self.done:
            rows = self.parts.flatten(0, 1) if shared else self.parts.transpose(0, 1)
            self.done[shared] = rows[0] if len(rows) == 1 else rows.sum(0)
        result = self.done[shared][..., place : place + item.size(bit)]
        return result.reshape(like.shape).to(like.dtype).contiguous()


def _shaped(item: Item, bit: int, result: Tensor) -> Tensor:
    """A gradient of every task as one of its operand."""
    like = item.given[NAMED[bit]]
    if bit == SCALE and not item.full:
        result = result.sum((1, 2, 3))
    if item.shared(bit):
        result = result.sum(0)
    return result.reshape(like.shape).to(like.dtype).contiguous()
