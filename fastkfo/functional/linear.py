"""Linear layers of T tasks: one batched product, whose derivatives are such products again."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkfo.functional import checks


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`y_t = x_t W_tᵀ + b_t` for every task t, by PyTorch's batched product.

    Args:
        x: `[T, N, ..., I]`, floating.
        weight: W, `[T, O, I]`.
        bias: b, `[T, O]`, or None for zero.

    Returns:
        `[T, N, ..., O]`; differentiable to any order, under vmap and autocast as any product is.

    Raises:
        TypeError: an operand is no floating-point tensor, or their dtypes differ.
        ValueError: shapes or devices do not match.
    """
    checks.operands(x=x, weight=weight, bias=bias)
    if x.dim() < 3:
        raise ValueError(f"x: expected a shape [T, N, ..., I], got {list(x.shape)}")
    if weight.dim() != 3 or (weight.shape[0], weight.shape[2]) != (x.shape[0], x.shape[-1]):
        expected = f"[{x.shape[0]}, O, {x.shape[-1]}]"
        raise ValueError(f"weight: expected a shape {expected}, got {list(weight.shape)}")
    checks.shapes(tuple(weight.shape[:2]), bias=bias)
    return linear_unchecked(x, weight, bias)


def linear_unchecked(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` for operands known to be right."""
    rows = x if x.dim() == 3 else x.reshape(x.shape[0], -1, x.shape[-1])
    # W Xᵀ, not X Wᵀ: its derivative in W is a product that MKL takes a quarter of the time for.
    if bias is None:
        y = torch.bmm(weight, rows.mT).mT
    else:
        y = torch.baddbmm(bias.unsqueeze(2), weight, rows.mT).mT
    return y if x.dim() == 3 else y.reshape(*x.shape[:-1], -1)
