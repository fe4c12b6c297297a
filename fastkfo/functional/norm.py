"""Batch norm of T tasks on batch statistics, with ReLU in the same pass.

Forward, backward and double backward are kernels; higher derivatives are those of the formula.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastkfo.functional import checks
from fastkfo.functional.folding import folded
from fastkfo.functional.function import apply, differentiated, with_eager_form
from fastkfo.kernels import layers, selector
from fastkfo.reference import norm as reference


class BatchNormResult(NamedTuple):
    """What a batch norm gives.

    Attributes:
        y: of x's shape and dtype.
        mean: of every task and channel, `[T, C]`, no gradient.
        var: the biased variance, likewise.
    """

    y: Tensor
    mean: Tensor
    var: Tensor


class Rule(NamedTuple):
    """What is not a tensor."""

    eps: float
    relu: bool
    implementation: str


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    relu: bool = False,
    implementation: str = "auto",
) -> BatchNormResult:
    """`y = (x − mean) / √(var + eps) · weight + bias`, then ReLU if asked for.

    Mean and variance are those of each task's channel over its samples and pixels, as in
    `F.batch_norm(training=True)` per task. y is differentiable to any order. bfloat16 and float16
    images have float32 statistics; their weight and bias may be float32.

    Args:
        x: `[T, N, C, H, W]` or `[T, N, C]`, floating, any strides.
        weight: γ, `[T, C]`, or None for one.
        bias: β, `[T, C]`, or None for zero.
        eps: is added to the variance.
        relu: whether negative results become zero. A NaN stays one.
        implementation: "auto", "native", "triton" or "reference".

    Returns:
        `BatchNormResult(y, mean, var)`; running statistics are the caller's.

    Raises:
        TypeError: an operand is no floating-point tensor, or of another dtype.
        ValueError: shapes or devices do not match, there is one value per channel only, or eps is
            negative.
        ImplementationUnavailable: the implementation named is not available.

    Source: Ioffe, Szegedy 2015; docs/layers.md has the derivatives.
    """
    checks.norm_operands(x, weight, bias, eps)
    if x.dim() not in (3, 5):
        raise ValueError(f"x: expected a shape [T, N, C] or [T, N, C, H, W], got {list(x.shape)}")
    checks.shapes((x.shape[0], x.shape[2]), weight=weight, bias=bias)
    values = x.shape[1] * x.shape[3:].numel()
    if values < 2 and x.numel() > 0:
        raise ValueError(f"x: expected more than one value per channel, got shape {list(x.shape)}")
    return batch_norm_unchecked(x, weight, bias, eps, relu, implementation)


def batch_norm_unchecked(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool = False,
    implementation: str = "auto",
) -> BatchNormResult:
    """`batch_norm` for operands known to be right."""
    chosen = selector.select(implementation, x.device, "layers")
    if chosen == "reference":
        wide = x.float() if x.dtype in layers.LOW else x
        y, mean, var = reference.batch_norm(wide, weight, bias, eps)
        y = y.to(x.dtype)
        return BatchNormResult(torch.relu(y) if relu else y, mean.detach(), var.detach())
    y, mean, var, _ = apply(BatchNorm, _rows(x), weight, bias, Rule(eps, relu, chosen))
    return BatchNormResult(_shaped(y, x.shape), mean, var)


def takes(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether kernels do this batch norm of `[T, N, C, ...]`, by precision."""
    kinds = (x.dtype, torch.float32) if x.dtype in layers.LOW else (x.dtype,)
    return all([t is None or t.dtype in kinds for t in (weight, bias)])


class Normed:
    """A batch norm that has run, and may turn out to be followed by ReLU.

    Args:
        x: `[T, N, C, ...]`.
        weight: `[T, C]`, `[1, C]` or None.
        bias: likewise.
        eps: is added to the variance.
        implementation: "auto", "native" or "triton".

    Attributes:
        result: of the norm.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        implementation: str = "auto",
    ) -> None:
        chosen = selector.select(implementation, x.device, "layers")
        self._rule, self._shape = Rule(eps, False, chosen), x.shape
        affine = [None if t is None else t.expand(len(x), -1) for t in (weight, bias)]
        self._operands = (_rows(x), *affine)
        y, self._mean, var, self._rstd = apply(BatchNorm, *self._operands, self._rule)
        self._y, self._version = y, y._version
        self.result = BatchNormResult(_shaped(y, x.shape), self._mean, var)

    def untouched(self) -> bool:
        """Whether nobody has written to the result."""
        return self._y._version == self._version

    def rectified(self) -> Tensor:
        """ReLU of the result, whose derivatives are those of norm and ReLU in one pass."""
        rule = self._rule._replace(relu=True)
        known = (self._y.detach(), self._mean, self._rstd, rule)
        return _shaped(apply(Rectified, *self._operands, *known), self._shape)


def _rows(x: Tensor) -> Tensor:
    """`[T, N, C, ...]` as `[T, P, C]`: a view where x lies channels last."""
    return x if x.dim() == 3 else x.movedim(2, -1).flatten(1, -2)


def _shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    """`[T, P, C]` as `[T, N, C, ...]`, a view."""
    if len(shape) == 3:
        return rows
    tasks, samples, channels, *rest = shape
    return rows.view(tasks, samples, *rest, channels).movedim(-1, 2)


@with_eager_form
class BatchNorm(Function):
    """y, mean, var and 1/√(var + eps); the latter three are constants."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, rule: Rule
    ) -> tuple[Tensor, ...]:
        operands = (x.contiguous(), *layers.parameters(x, weight, bias), rule.eps, rule.relu)
        y, mean, var = layers.run(rule.implementation, "batch_norm", *operands)
        return layers.narrowed(y, x), mean, var, (var + rule.eps).sqrt().reciprocal()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, ctx.rule = inputs
        _, mean, var, rstd = output
        ctx.mark_non_differentiable(mean, var, rstd)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        dx, d_weight, d_bias = apply(BatchNormBackward, dy, *ctx.saved_tensors, ctx.rule)
        need = ctx.needs_input_grad
        return dx, d_weight if need[1] else None, d_bias if need[2] else None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return folded(BatchNorm, info, in_dims, args)


@with_eager_form
class Rectified(Function):
    """ReLU of y, the batch norm of x, as a function of what the norm is one of."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor,
        mean: Tensor,
        rstd: Tensor,
        rule: Rule,
    ) -> Tensor:
        return torch.relu(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, _, mean, rstd, ctx.rule = inputs
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        dx, d_weight, d_bias = apply(BatchNormBackward, dy, *ctx.saved_tensors, ctx.rule)
        need = ctx.needs_input_grad
        rows = (d_weight if need[1] else None, d_bias if need[2] else None)
        return dx, *rows, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return folded(Rectified, info, in_dims, args)


@with_eager_form
class BatchNormBackward(Function):
    """dx, d_weight and d_bias, given mean and 1/√(var + eps) of the same x."""

    @staticmethod
    def forward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        rule: Rule,
    ) -> tuple[Tensor, Tensor, Tensor]:
        operands = (dy.contiguous(), x.contiguous(), mean, rstd)
        rest = (*layers.parameters(x, weight, bias), rule.relu)
        name = "batch_norm_backward"
        dx, d_weight, d_bias = layers.run(rule.implementation, name, *operands, *rest)
        like = weight if weight is not None else d_weight
        d_weight, d_bias = layers.narrowed(d_weight, like), layers.narrowed(d_bias, like)
        return layers.narrowed(dx, x), d_weight, d_bias

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.rule = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, a: Tensor | None, b: Tensor | None, c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        dy, x, weight, bias, mean, rstd = ctx.saved_tensors
        if a is None and b is None and c is None:
            return (None,) * 7
        a = torch.zeros_like(x) if a is None else a
        if differentiated(a, b, c, dy, x, weight):
            rule = (ctx.rule.eps, ctx.rule.relu)
            wide: Any = [*layers.widened(a, b, c, dy, x, weight, bias), *rule]
            d_dy, dx, d_weight = reference.batch_norm_double_backward(*wide)
        else:
            operands = (a, b, c, dy, x, weight, bias, mean, rstd)
            d_dy, dx, d_weight = double_backward(*operands, ctx.rule)
        need = ctx.needs_input_grad
        found = (d_dy if need[0] else None, dx if need[1] else None)
        return (*found, d_weight if need[2] else None, None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return folded(BatchNormBackward, info, in_dims, args)


def double_backward(
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """The cotangents of dy, x and weight for those, a, b, c, of dx, d_weight, d_bias."""
    cotangents = (a.contiguous(), *layers.parameters(x, b, c), dy.contiguous())
    operands = (x.contiguous(), mean, rstd, *layers.parameters(x, weight, bias), rule.relu)
    name = "batch_norm_double_backward"
    d_dy, dx, d_weight = layers.run(rule.implementation, name, *cotangents, *operands)
    like = weight if weight is not None else d_weight
    narrow = layers.narrowed
    return narrow(d_dy, x), narrow(dx, x), narrow(d_weight, like)
