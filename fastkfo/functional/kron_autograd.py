"""Autograd and vmap of the native Kronecker update.

Calls are laid out as in kron_layout.py. Derivatives are again Functions, up to the second; beyond
it they are those of the reference formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastkfo.functional.function import apply, cached, with_eager_form
from fastkfo.functional.kron_layout import (
    BACKWARD_BITS,
    COTANGENT,
    DOUBLE_BITS,
    DOUBLE_OUT,
    FORWARD_BITS,
    GRAD,
    PARAM,
    TANGENT_BITS,
    X_BITS,
    Fold,
    Group,
    by_bit,
    call,
    canonical,
    slices,
    split,
)
from fastkfo.kernels.kron import run
from fastkfo.reference.kron import Operands, kron_double_backward


class Plan(NamedTuple):
    """What a backward has to compute: bits per item, and where the results go."""

    wanted: tuple[int, ...]
    slots: tuple[int, ...]  # in the order in which a raw op returns its results
    size: int


@cached
def _plan(
    in_bits: tuple[int, ...],
    out_bits: tuple[int, ...],
    present: int,
    count: int,
    needs: tuple[bool, ...],
    live: tuple[bool, ...],
) -> Plan:
    """The plan for operands `in_bits`, of which those in `out_bits` may want a gradient."""
    first = {b: s.start for b, s in zip(in_bits, slices(in_bits, present, count), strict=True)}
    wanted, slots = [], []
    for i in range(count):
        bits = 0
        for bit in out_bits:
            if live[i] and present & bit and needs[first[bit] + i]:
                bits |= bit
                slots.append(first[bit] + i)
        wanted.append(bits)
    return Plan(tuple(wanted), tuple(slots), len(needs))


def _scattered(plan: Plan, results: Sequence[Tensor]) -> list[Tensor | None]:
    gradients: list[Tensor | None] = [None] * plan.size
    for slot, result in zip(plan.slots, results, strict=True):
        gradients[slot] = result
    return gradients


@with_eager_form
class KronForward(Function):
    """`θ + α S ∘ (A G C + β)`."""

    @staticmethod
    def forward(dims: Any, alpha: Any, present: int, how: str, *tensors: Tensor | None) -> Any:
        params, *x = split(FORWARD_BITS, present, len(alpha), tensors)
        return tuple(run(how, "kron_forward", *x, params, dims, alpha))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.dims, ctx.alpha, ctx.present, ctx.how = inputs[:4]
        ctx.set_materialize_grads(False)
        count = len(ctx.alpha)
        # Neither θ nor, where nothing multiplies it that is learned, G is needed again.
        skip = count if ctx.present & PARAM else 0
        ctx.kept = ctx.present & ~PARAM
        if not any(ctx.needs_input_grad[4 + skip + count :]):
            skip += count
            ctx.kept &= ~GRAD
        ctx.save_for_backward(*inputs[4 + skip :])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        alpha, count = ctx.alpha, len(ctx.alpha)
        live = tuple(c is not None for c in cotangents)
        plan = _plan(FORWARD_BITS, X_BITS, ctx.present, count, ctx.needs_input_grad[4:], live)
        tensors = ctx.saved_tensors
        if plan.slots:
            if False in live:  # its item wants nothing; the op needs a shape
                cotangents = tuple(_filled(cotangents, ctx.dims, tensors))
            present = ctx.kept | COTANGENT
            results = _apply_if_differentiated(
                KronBackward, ctx.dims, alpha, present, ctx.how, plan.wanted, *cotangents, *tensors
            )
        else:
            results = ()
        gradients = _scattered(plan, results)
        if ctx.present & PARAM:
            for i, c in enumerate(cotangents):
                if live[i] and ctx.needs_input_grad[4 + i]:
                    gradients[i] = c
        return (None, None, None, None, *gradients)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, dims: Any, alpha: Any, present: int, how: str, *tensors: Any
    ) -> Any:
        fold = Fold(info.batch_size, dims)
        x = by_bit(FORWARD_BITS, present, len(alpha), tensors)
        d = by_bit(FORWARD_BITS, present, len(alpha), in_dims[4:])
        # What is mapped by none and has no task axis stays shared.
        folded = {
            bit: [fold.operand(i, x[bit][i], d[bit][i], bit, share=bit not in (PARAM, GRAD))
                  for i in range(len(x[bit]))]
            for bit in FORWARD_BITS
        }  # fmt: skip
        out = call(KronForward, fold.dims, alpha, (how,), folded)
        shapes = [fold.logical_shape(x[GRAD][i], d[GRAD][i]) for i in range(len(alpha))]
        return tuple(u.reshape(fold.size, *shape) for u, shape in zip(out, shapes, strict=True)), (
            0,
        ) * len(alpha)


def _filled(cotangents: Group, dims: Any, like: Sequence[Tensor | None]) -> list[Tensor]:
    source = next(x for x in (*cotangents, *like) if x is not None)
    return [
        source.new_zeros(dims[4 * i : 4 * i + 4]) if c is None else c
        for i, c in enumerate(cotangents)
    ]


def _apply_if_differentiated(function: Any, *args: Any) -> Any:
    """As a Function only where its result may be differentiated."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return apply(function, *args)
    return function.forward(*args)


def _stand_in(group: Group, cotangents: Group) -> Group:
    """Gradients for the raw op, which reads only their shape where they were not kept."""
    return group or cotangents


@with_eager_form
class KronBackward(Function):
    """The vector-Jacobian product of `KronForward`, for the bits in `wanted` of each item."""

    @staticmethod
    def forward(dims: Any, alpha: Any, present: int, how: str, wanted: Any, *tensors: Any) -> Any:
        cotangents, grads, *x = split(BACKWARD_BITS, present, len(alpha), tensors)
        grads = _stand_in(grads, cotangents)
        return tuple(run(how, "kron_backward", cotangents, grads, *x, dims, alpha, wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.dims, ctx.alpha, ctx.present, ctx.how, ctx.wanted = inputs[:5]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[5:])

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Any, ...]:
        count, tensors = len(ctx.alpha), ctx.saved_tensors
        d: dict[int, list[Tensor | None]] = {bit: [None] * count for bit in X_BITS}
        outputs = iter(d_outputs)
        for i, bits in enumerate(ctx.wanted):
            for bit in X_BITS:
                if bits & bit:
                    d[bit][i] = next(outputs)
        live = tuple([any([d[bit][i] is not None for bit in X_BITS]) for i in range(count)])
        plan = _plan(BACKWARD_BITS, DOUBLE_OUT, ctx.present, count, ctx.needs_input_grad[5:], live)
        present = ctx.present
        for bit in X_BITS:
            if any([x is not None for x in d[bit]]):
                present |= bit << 8
                tensors = (*tensors, *d[bit])
        results = _apply_if_differentiated(
            KronDoubleBackward, ctx.dims, ctx.alpha, present, ctx.how, plan.wanted, *tensors
        )
        return (None, None, None, None, None, *_scattered(plan, results))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap_derivative(KronBackward, X_BITS, BACKWARD_BITS, info, in_dims, *args)


@with_eager_form
class KronDoubleBackward(Function):
    """The vector-Jacobian product of `KronBackward`."""

    @staticmethod
    def forward(dims: Any, alpha: Any, present: int, how: str, wanted: Any, *tensors: Any) -> Any:
        cotangents, grads, *x = split(DOUBLE_BITS, present, len(alpha), tensors)
        grads = _stand_in(grads, cotangents)
        return tuple(run(how, "kron_double_backward", cotangents, grads, *x, dims, alpha, wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.dims, ctx.alpha, ctx.present, _, ctx.wanted, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Any, ...]:
        given = [k for k, x in enumerate(ctx.saved_tensors) if x is not None]

        def formula(*tensors: Tensor) -> tuple[Tensor, ...]:
            full: list[Tensor | None] = [None] * len(ctx.saved_tensors)
            for k, x in zip(given, tensors, strict=True):
                full[k] = x
            return tuple(_reference(ctx.dims, ctx.alpha, ctx.present, ctx.wanted, full))

        vjp: Any = torch.func.vjp(formula, *(ctx.saved_tensors[k] for k in given))[1]
        gradients: list[Tensor | None] = [None] * len(ctx.saved_tensors)
        for k, x in zip(given, vjp(d_outputs), strict=True):
            gradients[k] = x
        return (None, None, None, None, None, *gradients)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap_derivative(KronDoubleBackward, DOUBLE_OUT, DOUBLE_BITS, info, in_dims, *args)


def _reference(
    dims: Any, alpha: Any, present: int, wanted: Any, tensors: Sequence[Tensor | None]
) -> list[Tensor]:
    """KronDoubleBackward by the differentiable formula."""
    x = by_bit(DOUBLE_BITS, present, len(alpha), tensors)
    out: list[Tensor] = []
    for i, bits in enumerate(wanted):
        if not bits:
            continue
        shape = dims[4 * i : 4 * i + 4]
        given = {
            bit: canonical(group[i], bit, shape) if group else None for bit, group in x.items()
        }
        cotangent = given[COTANGENT]
        assert cotangent is not None
        grad = torch.zeros_like(cotangent) if given[GRAD] is None else given[GRAD]
        operands = Operands(grad, *(given[bit] for bit in X_BITS[1:]))
        tangents = Operands(*(given[bit] for bit in TANGENT_BITS))
        to_cotangent, gradients = kron_double_backward(cotangent, operands, tangents, alpha[i])
        results: dict[int, Any] = dict(zip(X_BITS, gradients, strict=True)) | {
            COTANGENT: to_cotangent
        }
        for bit in DOUBLE_OUT:
            if bits & bit:
                like = x[bit][i]
                result = results[bit]
                full = given[bit].shape  # type: ignore[union-attr]
                out.append(result.sum_to_size(full).reshape(like.shape))
    return out


def _vmap_derivative(
    function: Any,
    out_bits: Sequence[int],
    in_bits: tuple[int, ...],
    info: Any,
    in_dims: Any,
    dims: Any,
    alpha: Any,
    present: int,
    how: str,
    wanted: Any,
    *tensors: Any,
) -> Any:
    """A derivative under vmap: every operand gets its own row per mapped entry and task."""
    count = len(alpha)
    fold = Fold(info.batch_size, dims)
    x = by_bit(in_bits, present, count, tensors)
    d = by_bit(in_bits, present, count, in_dims[5:])
    folded = {
        bit: [fold.operand(i, x[bit][i], d[bit][i], bit, share=False) for i in range(len(x[bit]))]
        for bit in in_bits
    }
    # The raw ops tell a shared scale by its single number, so tasks of one need four axes.
    out = iter(call(function, fold.dims, alpha, (how, wanted), folded))
    results = []
    for i, bits in enumerate(wanted):
        for bit in out_bits:
            if not bits & bit:
                continue
            source = bit if x[bit] and x[bit][i] is not None else COTANGENT
            shape = fold.logical_shape(x[source][i], d[source][i])
            tasks = dims[4 * i]
            rows = next(out).unflatten(0, (fold.size, tasks))
            one = canonical(x[source][i].new_empty(shape), source, dims[4 * i : 4 * i + 4])
            assert one is not None
            if one.shape[0] == 1 and tasks != 1:
                rows = rows.sum(1, keepdim=True)
            results.append(rows.reshape(fold.size, *shape))
    return tuple(results), (0,) * len(results)
