"""Softmax cross-entropy of T tasks and its derivatives.

With z the logits `[T, S, C]`, y the labels `[T, S]`, p = softmax(z) and e the unit vectors of y:

    loss = −1/S Σ_S log p[y]      gradient = c (p − e)/S

and, for a cotangent v of the gradient, `c̄ = ⟨v, (p − e)/S⟩` and `z̄ = c/S p ∘ (v − ⟨p, v⟩)`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss of every task, `[T]`; p, and (p − e)/S, `[T, S, C]`."""
    log_p = torch.log_softmax(logits, -1)
    loss = -log_p.gather(-1, labels.unsqueeze(-1)).mean((1, 2))
    return loss, *probabilities(logits, labels)


def probabilities(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """p, and (p − e)/S."""
    p = torch.softmax(logits, -1)
    unit = torch.zeros_like(p).scatter(-1, labels.unsqueeze(-1), 1.0)
    return p, (p - unit) / logits.shape[1]


def cross_entropy_backward(cotangent: Tensor, residual: Tensor) -> Tensor:
    """`c (p − e)/S`, `[T, S, C]`, for c `[T]`."""
    return residual * cotangent.reshape(-1, 1, 1)


def cross_entropy_double_backward(
    v: Tensor, cotangent: Tensor, p: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """`c̄` `[T]` and `z̄` `[T, S, C]` for a cotangent v `[T, S, C]` of the gradient."""
    to_cotangent = (v * residual).sum((1, 2))
    pv = p * v
    to_logits = torch.addcmul(pv, p, pv.sum(-1, keepdim=True), value=-1)
    return to_cotangent, to_logits * (cotangent / p.shape[1]).reshape(-1, 1, 1)
