"""Softmax cross-entropy per task, closed under differentiation to the second order.

PyTorch's own derivative of a softmax over a handful of classes takes longer than all other work of
a small head; these are elementwise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastkfo.reference.cross_entropy import (
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_double_backward,
)


class CrossEntropy(Function):
    """`[T, S, C]` logits and `[T, S]` labels to the mean loss of every task, `[T]`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        return cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        if torch.is_grad_enabled():
            return CrossEntropyBackward.apply(cotangent, logits, labels), None
        return cross_entropy_backward(cotangent, logits, labels), None


class CrossEntropyBackward(Function):
    """The vector-Jacobian product of `CrossEntropy`."""

    @staticmethod
    def forward(ctx: Any, cotangent: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(cotangent, logits, labels)
        return cross_entropy_backward(cotangent, logits, labels)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # Plain operations: a third derivative is autograd's own.
        return (*cross_entropy_double_backward(v, *ctx.saved_tensors), None)
