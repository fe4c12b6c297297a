"""Layer norm of T tasks; forward, backward and double backward are kernels."""

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


class Rule(NamedTuple):
    """What is not a tensor."""

    eps: float
    implementation: str


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    implementation: str = "auto",
) -> Tensor:
    """`y = (x − mean) / √(var + eps) · weight + bias`, statistics over the last axis.

    What `F.layer_norm` computes per task; differentiable to any order. bfloat16 and float16 have
    float32 statistics; their weight and bias may be float32.

    Args:
        x: `[T, ..., D]`, floating, any strides.
        weight: γ, `[T, D]`, or None for one.
        bias: β, `[T, D]`, or None for zero.
        eps: is added to the variance.
        implementation: "auto", "native" or "reference".

    Returns:
        y of x's shape and dtype.

    Raises:
        TypeError: an operand is no floating-point tensor, or of another dtype.
        ValueError: shapes or devices do not match, or eps is negative.
        ImplementationUnavailable: the implementation named is not available.

    Source: Ba, Kiros, Hinton 2016; docs/layers.md has the derivatives.
    """
    checks.norm_operands(x, weight, bias, eps)
    if x.dim() < 2 or x.shape[-1] == 0:
        raise ValueError(f"x: expected a shape [T, ..., D], D at least 1, got {list(x.shape)}")
    checks.shapes((x.shape[0], x.shape[-1]), weight=weight, bias=bias)
    return layer_norm_unchecked(x, weight, bias, eps, implementation)


def layer_norm_unchecked(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, implementation: str = "auto"
) -> Tensor:
    """`layer_norm` for operands known to be right."""
    chosen = selector.select(implementation, x.device, "layer_norm")
    rows = x.reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])
    if chosen == "reference":
        wide = rows.float() if x.dtype in layers.LOW else rows
        return reference.layer_norm(wide, weight, bias, eps).to(x.dtype).reshape(x.shape)
    y: Tensor = apply(LayerNorm, rows, weight, bias, Rule(eps, chosen))[0]
    return y.reshape(x.shape)


@with_eager_form
class LayerNorm(Function):
    """y, mean and 1/√(var + eps); the latter two are constants."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        operands = (x.contiguous(), *layers.parameters(x, weight, bias), rule.eps)
        y, mean, rstd = layers.run(rule.implementation, "layer_norm", *operands)
        return layers.narrowed(y, x), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, ctx.rule = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        x, weight, _, mean, rstd = ctx.saved_tensors
        dx, d_weight, d_bias = apply(LayerNormBackward, dy, x, weight, mean, rstd, ctx.rule)
        need = ctx.needs_input_grad
        return dx, d_weight if need[1] else None, d_bias if need[2] else None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return folded(LayerNorm, info, in_dims, args)


@with_eager_form
class LayerNormBackward(Function):
    """dx, d_weight and d_bias, given mean and 1/√(var + eps) of the same x."""

    @staticmethod
    def forward(
        dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = (dy.contiguous(), x.contiguous(), mean, rstd, *layers.parameters(x, weight))
        dx, d_weight, d_bias = layers.run(rule.implementation, "layer_norm_backward", *rows)
        like = weight if weight is not None else d_weight
        return (
            layers.narrowed(dx, x),
            layers.narrowed(d_weight, like),
            layers.narrowed(d_bias, like),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.rule = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, a: Tensor | None, b: Tensor | None, c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        dy, x, weight, mean, rstd = ctx.saved_tensors
        if a is None and b is None and c is None:
            return (None,) * 6
        a = torch.zeros_like(x) if a is None else a
        if differentiated(a, b, c, dy, x, weight):
            wide: Any = [*layers.widened(a, b, c, dy, x, weight), ctx.rule.eps]
            d_dy, dx, d_weight = reference.layer_norm_double_backward(*wide)
        else:
            operands = (a.contiguous(), *layers.parameters(x, b, c), dy.contiguous())
            rest = (x.contiguous(), mean, rstd, *layers.parameters(x, weight))
            run = (ctx.rule.implementation, "layer_norm_double_backward")
            d_dy, dx, d_weight = layers.run(*run, *operands, *rest)
            d_dy, dx = layers.narrowed(d_dy, x), layers.narrowed(dx, x)
            d_weight = layers.narrowed(d_weight, weight if weight is not None else d_weight)
        need = ctx.needs_input_grad
        found = (d_dy if need[0] else None, dx if need[1] else None)
        return (*found, d_weight if need[2] else None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return folded(LayerNormBackward, info, in_dims, args)
