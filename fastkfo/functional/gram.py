"""The products that make factors positive semi-definite, for all factors of a learner at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastkfo import reference
from fastkfo.functional import checks
from fastkfo.functional.function import apply, batched_first, with_eager_form
from fastkfo.kernels import selector
from fastkfo.kernels.kron import gram_for_blas, run


def gram(factors: Sequence[Tensor], *, implementation: str = "auto") -> list[Tensor]:
    """`LᵀL` of every factor in one call; differentiable to any order.

    Args:
        factors: L of any shapes `[..., r, n]`; float32, float64, bfloat16 or float16 (the latter
            two are accumulated in float32), any strides.
        implementation: "auto", "native", "triton" or "reference".

    Returns:
        One tensor `[..., n, n]` per factor.

    Raises:
        TypeError: `factors` is no list, or a factor is not a floating-point tensor.
        ValueError: a factor has fewer than two axes, or `implementation` is unknown.
        ImplementationUnavailable: the implementation named is not available.
    """
    given: object = factors
    if isinstance(given, Tensor) or not isinstance(given, Sequence):
        raise TypeError(f"factors: expected a list of tensors, got {type(factors).__name__}")
    for i, factor in enumerate(factors):
        checks.floating_tensor(f"factors[{i}]", factor)
        if factor.dim() < 2:
            raise ValueError(
                f"factors[{i}]: expected a shape [..., r, n], got {list(factor.shape)}"
            )
    return gram_unchecked(list(factors), implementation)


def gram_unchecked(factors: list[Tensor], implementation: str = "auto") -> list[Tensor]:
    """`gram` for factors known to be right."""
    if not factors:
        return []
    groups = checks.by_dtype_and_device(factors)
    if len(groups) > 1:
        return checks.scatter(
            groups, lambda ids: gram_unchecked([factors[i] for i in ids], implementation)
        )
    device = factors[0].device
    how = selector.select(implementation, device, "kron")
    if how != "reference" and device.type != "cpu":
        large = [i for i, x in enumerate(factors) if _for_blas(x)]
        if large and len(large) < len(factors):
            small = [i for i in range(len(factors)) if i not in large]
            return checks.scatter(
                [small, large],
                lambda ids: gram_unchecked([factors[i] for i in ids], implementation),
            )
        how = "reference" if large else how
    if how == "reference":
        with checks.without_autocast(device):
            return [reference.gram.gram(factor) for factor in factors]
    return list(apply(Gram, how, *factors))


def _for_blas(factor: Tensor) -> bool:
    return gram_for_blas(math.prod(factor.shape[:-2]), *factor.shape[-2:])


def _vmap(
    function: Any, info: Any, in_dims: Sequence[Any], how: str, args: Sequence[Tensor]
) -> Any:
    moved = [batched_first(x, d, info.batch_size) for x, d in zip(args, in_dims[1:], strict=True)]
    out = function.apply(how, *moved)
    return out, (0,) * len(out)


def _filled(cotangents: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [
        x.new_zeros((*x.shape[:-2], x.shape[-1], x.shape[-1])) if c is None else c
        for c, x in zip(cotangents, like, strict=True)
    ]


class _Bilinear(Function):
    """A function of the factors followed by as many partners, without gaps in its derivatives."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.how, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)


@with_eager_form
class Gram(_Bilinear):
    """`LᵀL`."""

    @staticmethod
    def forward(how: str, *factors: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(how, "gram", factors))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        factors = ctx.saved_tensors
        live = [
            i for i, c in enumerate(cotangents) if c is not None and ctx.needs_input_grad[1 + i]
        ]
        grads: list[Tensor | None] = [None] * len(factors)
        if live:
            out = apply(
                GramVjp, ctx.how, *(factors[i] for i in live), *(cotangents[i] for i in live)
            )
            for i, grad in zip(live, out, strict=True):
                grads[i] = grad
        return (None, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: Any, how: str, *factors: Tensor) -> Any:
        return _vmap(Gram, info, in_dims, how, factors)


@with_eager_form
class GramVjp(_Bilinear):
    """`L (V + Vᵀ)`."""

    @staticmethod
    def forward(how: str, *args: Tensor) -> tuple[Tensor, ...]:
        half = len(args) // 2
        return tuple(run(how, "gram_vjp", args[:half], args[half:]))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        half = len(ctx.saved_tensors) // 2
        factors, partners = ctx.saved_tensors[:half], ctx.saved_tensors[half:]
        d = [
            torch.zeros_like(x) if c is None else c
            for c, x in zip(cotangents, factors, strict=True)
        ]
        to_factors = (
            apply(GramVjp, ctx.how, *d, *partners)
            if any(ctx.needs_input_grad[1 : 1 + half])
            else None
        )
        to_partners = (
            apply(GramJvp, ctx.how, *factors, *d) if any(ctx.needs_input_grad[1 + half :]) else None
        )
        return (None, *(to_factors or [None] * half), *(to_partners or [None] * half))

    @staticmethod
    def vmap(info: Any, in_dims: Any, how: str, *args: Tensor) -> Any:
        return _vmap(GramVjp, info, in_dims, how, args)


@with_eager_form
class GramJvp(_Bilinear):
    """`LᵀM + MᵀL`."""

    @staticmethod
    def forward(how: str, *args: Tensor) -> tuple[Tensor, ...]:
        half = len(args) // 2
        return tuple(run(how, "gram_jvp", args[:half], args[half:]))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        half = len(ctx.saved_tensors) // 2
        factors, tangents = ctx.saved_tensors[:half], ctx.saved_tensors[half:]
        d = _filled(cotangents, factors)
        to_factors = (
            apply(GramVjp, ctx.how, *tangents, *d)
            if any(ctx.needs_input_grad[1 : 1 + half])
            else None
        )
        to_tangents = (
            apply(GramVjp, ctx.how, *factors, *d) if any(ctx.needs_input_grad[1 + half :]) else None
        )
        return (None, *(to_factors or [None] * half), *(to_tangents or [None] * half))

    @staticmethod
    def vmap(info: Any, in_dims: Any, how: str, *args: Tensor) -> Any:
        return _vmap(GramJvp, info, in_dims, how, args)
