"""Softmax cross-entropy per task, closed under differentiation to the second order.

PyTorch's own derivative of a softmax over a handful of classes takes longer than all other work of
a small head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastkfo.functional import checks
from fastkfo.kernels import selector
from fastkfo.reference import cross_entropy as reference


def cross_entropy(logits: Tensor, labels: Tensor, *, implementation: str = "auto") -> Tensor:
    """`−1/S Σ_s log softmax(z_s)[y_s]` of every task; differentiable to any order in the logits.

    First and second derivatives are kernels. float16 and bfloat16, and whatever runs under a
    transform of `torch.func`, take the formula in plain PyTorch.

    Args:
        logits: z, `[T, S, C]`, floating, any strides.
        labels: y, `[T, S]`, int64, from 0 to C − 1.
        implementation: "auto", "native" or "reference".

    Returns:
        The losses, `[T]`.

    Raises:
        TypeError: `logits` is no floating-point tensor, or `labels` no int64 tensor.
        ValueError: shapes do not match, there is no sample or class, or (on the CPU) a label is out
            of range.
        ImplementationUnavailable: the implementation named is not available.

    Source: docs/cross_entropy.md has the derivatives.
    """
    checks.floating_tensor("logits", logits)
    given: object = labels
    if not isinstance(given, Tensor) or given.dtype != torch.int64:
        got = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"labels: expected a tensor of int64, got {got}")
    if logits.dim() != 3 or 0 in logits.shape[1:]:
        raise ValueError(
            f"logits: expected a shape [T, S, C] with S and C at least 1, got {list(logits.shape)}"
        )
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels: expected shape {list(logits.shape[:2])}, got {list(labels.shape)}"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels: expected device {logits.device} as logits, got {labels.device}")
    if not torch._C._are_functorch_transforms_active():
        check_range("labels", labels, logits.shape[-1])
    return cross_entropy_unchecked(logits, labels, implementation)


def check_range(name: str, labels: Tensor, classes: int) -> None:
    """Raise ValueError for a label that is out of range, where a look does not synchronise."""
    if labels.device.type != "cpu" or labels.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(x) for x in labels.aminmax())
    if low < 0 or high >= classes:
        bad = low if low < 0 else high
        raise ValueError(f"{name}: expected labels from 0 to {classes - 1}, got {bad}")


def cross_entropy_unchecked(logits: Tensor, labels: Tensor, implementation: str = "auto") -> Tensor:
    """`cross_entropy` for operands known to be right."""
    chosen = selector.select(implementation, logits.device)
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return reference.cross_entropy(logits, labels)[0]
    if logits.dtype not in (torch.float32, torch.float64):
        chosen = "reference"
    result: Tensor = CrossEntropy.apply(logits, labels, chosen == "native")
    return result


class CrossEntropy(Function):
    """`[T, S, C]` logits and `[T, S]` labels to the mean loss of every task, `[T]`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, native: bool) -> Tensor:
        run = torch.ops.fastkfo.cross_entropy.default if native else reference.cross_entropy
        loss, p, residual = run(logits, labels)
        ctx.save_for_backward(logits, labels, p, residual)
        ctx.native = native
        return loss

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return CrossEntropyBackward.apply(cotangent, *saved, ctx.native), None, None
        return reference.cross_entropy_backward(cotangent, saved[3]), None, None


class CrossEntropyBackward(Function):
    """The vector-Jacobian product of `CrossEntropy`, whose p and residual it is given."""

    @staticmethod
    def forward(
        ctx: Any,
        cotangent: Tensor,
        logits: Tensor,
        labels: Tensor,
        p: Tensor,
        residual: Tensor,
        native: bool,
    ) -> Tensor:
        ctx.save_for_backward(cotangent, logits, labels, p, residual)
        ctx.native = native
        return reference.cross_entropy_backward(cotangent, residual)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        cotangent, logits, labels, p, residual = ctx.saved_tensors
        run: Any = reference.cross_entropy_double_backward
        if torch.is_grad_enabled():  # a third derivative is autograd's own
            p, residual = reference.probabilities(logits, labels)
        elif ctx.native:
            run = torch.ops.fastkfo.cross_entropy_double_backward.default
        return (*run(v, cotangent, p, residual), None, None, None, None)
