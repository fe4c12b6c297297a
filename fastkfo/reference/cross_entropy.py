"""Softmax cross-entropy of T tasks and its derivatives.

With z the logits `[T, S, C]`, y the labels `[T, S]`, p = softmax(z) and e the unit vectors of y:

    loss = −1/S Σ_S log p[y]      gradient = c/S (p − e)

and, for a cotangent v of the gradient, `c̄ = 1/S ⟨v, p − e⟩` and `z̄ = c/S p ∘ (v − ⟨p, v⟩)`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of every task, `[T]`."""
    log_p = torch.log_softmax(logits, -1)
    return log_p.gather(-1, labels.unsqueeze(-1)).flatten(1).mean(1).neg()


def cross_entropy_backward(cotangent: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """`c/S (p − e)`, `[T, S, C]`, for c `[T]`."""
    residual = _residual(torch.softmax(logits, -1), labels)
    return residual * (cotangent / logits.shape[1]).reshape(-1, 1, 1)


def cross_entropy_double_backward(
    v: Tensor, cotangent: Tensor, logits: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """`c̄` `[T]` and `z̄` `[T, S, C]` for a cotangent v `[T, S, C]` of the gradient."""
    p = torch.softmax(logits, -1)
    size = logits.shape[1]
    to_cotangent = (v * _residual(p, labels)).flatten(1).sum(1) / size
    centred = v - (p * v).sum(-1, keepdim=True)
    return to_cotangent, centred * p * (cotangent / size).reshape(-1, 1, 1)


def _residual(p: Tensor, labels: Tensor) -> Tensor:
    index = labels.unsqueeze(-1)
    return p.scatter_add(-1, index, p.new_full((1, 1, 1), -1.0).expand(index.shape))
