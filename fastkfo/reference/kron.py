"""The Kronecker update of one item, `θ' = θ + α · S ∘ (A G C + β)`, and its derivatives.

Shapes, with T tasks and a batch of B: G, θ and cotangents `[T, B, n, m]`; A `[T, n, n]`,
C `[T, m, m]`, β `[T, n, m]`, T being 1 for what all tasks share; S broadcasts to G. An absent A
or C is the identity, an absent β zero, an absent S one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Operands(NamedTuple):
    """What one item's transform is made of, or its tangents."""

    grad: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None


def kron_transform(x: Operands) -> Tensor:
    """`U = S ∘ (A G C + β)`, `[T, B, n, m]`."""
    u = _product(_given(x.grad), x.left, x.right)
    if x.bias is not None:
        u = u + x.bias.unsqueeze(1)
    return u if x.scale is None else x.scale * u


def kron_double_backward(
    cotangent: Tensor, x: Operands, d: Operands, alpha: float
) -> tuple[Tensor, Operands]:
    """The derivative of kron_backward: `(λ̄, x̄)` for cotangents `d` of what it returned for x.

    kron_backward is the gradient of `⟨λ, Y(x)⟩`, so its derivative along d is symmetric: λ̄ is the
    tangent of Y along d, and x̄ the tangent of the gradient itself.

    Args:
        cotangent: λ, `[T, B, n, m]`.
        x: the operands; the gradient must be there.
        d: cotangents of the operands' gradients.
        alpha: α.

    Returns:
        λ̄ and x̄, the latter per task (not yet summed to the shapes of shared operands).
    """
    a, c, s = x.left, x.right, x.scale
    g = _given(x.grad)
    y = _product(g, a, c) + _zero_or(x.bias)
    dy = (
        _product_or_zero(d.grad, a, c)
        + (0 if d.left is None else _product(g, d.left, c))
        + (0 if d.right is None else _product(g, a, d.right))
        + _zero_or(d.bias)
    )
    s_ = 1 if s is None else s
    ds = 0 if d.scale is None else d.scale
    w, dw = alpha * s_ * cotangent, alpha * ds * cotangent

    p, z = _product(g, None, c), _product(w, _t(a), None)
    dp = _product_or_zero(d.grad, None, c) + (0 if d.right is None else _product(g, None, d.right))
    dz = _product(dw, _t(a), None) + (0 if d.left is None else _product(w, _t(d.left), None))
    zero = torch.zeros_like(cotangent)
    dp, dy = dp + zero, dy + zero
    grad = _product(dz, None, _t(c)) + (0 if d.right is None else _product(z, None, _t(d.right)))
    dg = zero if d.grad is None else d.grad
    tangents = Operands(
        grad,
        (dw @ p.mT + w @ dp.mT).sum(1),
        (dg.mT @ z + g.mT @ dz).sum(1),
        (dw + zero).sum(1),
        alpha * cotangent * dy,
    )
    return alpha * (s_ * dy + ds * y) + zero, tangents


def _product(grad: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    if left is not None:
        grad = left.unsqueeze(1) @ grad
    return grad if right is None else grad @ right.unsqueeze(1)


def _given(x: Tensor | None) -> Tensor:
    if x is None:
        raise TypeError("x: expected operands with a gradient, got None")
    return x


def _product_or_zero(
    grad: Tensor | None, left: Tensor | None, right: Tensor | None
) -> Tensor | int:
    return 0 if grad is None else _product(grad, left, right)


def _zero_or(bias: Tensor | None) -> Tensor | int:
    return 0 if bias is None else bias.unsqueeze(1)


def _t(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.mT
