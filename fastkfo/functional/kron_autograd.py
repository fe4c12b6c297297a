"""Autograd and vmap of the native Kronecker update.

A call is `(dims, alpha, present, *tensors)`: dims T B n m and one alpha per item, then the groups
of operands that `present` has bits for, each with one tensor or None per item. Derivatives are
again Functions, up to the second; beyond it they are those of the reference formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastkfo.functional.function import apply, with_eager_form
from fastkfo.kernels.fakes import BIAS, COTANGENT, GRAD, LEFT, RIGHT, SCALE
from fastkfo.reference.kron import Operands, kron_double_backward

PARAM = 64
X_BITS = (GRAD, LEFT, RIGHT, BIAS, SCALE)
FORWARD_BITS = (PARAM, *X_BITS)
BACKWARD_BITS = (COTANGENT, *X_BITS)
TANGENT_BITS = tuple(bit << 8 for bit in X_BITS)
DOUBLE_BITS = (*BACKWARD_BITS, *TANGENT_BITS)

Group = Sequence[Tensor | None]


def call(
    function: Any,
    dims: tuple[int, ...],
    alpha: tuple[float, ...],
    extra: tuple[Any, ...],
    groups: dict[int, Group],
) -> tuple[Tensor, ...]:
    """Apply a Function to groups of operands, in the order of their bits."""
    present, tensors = 0, []
    for bit in DOUBLE_BITS if function is not KronForward else FORWARD_BITS:
        group = groups.get(bit)
        if group is not None and any(x is not None for x in group):
            present |= bit
            tensors.extend(group)
    return apply(function, dims, alpha, present, *extra, *tensors)


def split(bits: Sequence[int], present: int, count: int, tensors: Sequence[Any]) -> dict[int, Any]:
    """The groups of operands by bit; [] for an absent one."""
    groups, k = {}, 0
    for bit in bits:
        if present & bit:
            groups[bit] = tensors[k : k + count]
            k += count
        else:
            groups[bit] = []
    return groups


def _needs(ctx: Any, bits: Sequence[int], first: int, count: int) -> dict[int, Sequence[bool]]:
    groups = split(bits, ctx.present, count, ctx.needs_input_grad[first:])
    return {bit: needs or [False] * count for bit, needs in groups.items()}


def _pick(group: Group, wanted: Sequence[int], bits: int) -> Group:
    """The operands of those items that have any of `bits` in what is wanted of them."""
    return [x if w & bits else None for x, w in zip(group, wanted, strict=True)] if group else []


@with_eager_form
class KronForward(Function):
    """`θ + α S ∘ (A G C + β)`."""

    @staticmethod
    def forward(dims: Any, alpha: Any, present: int, *tensors: Tensor | None) -> Any:
        x = split(FORWARD_BITS, present, len(alpha), tensors)
        return tuple(
            torch.ops.fastkfo.kron_forward.default(
                _readable(x[GRAD], dims), x[LEFT], x[RIGHT], x[BIAS], _readable(x[SCALE], dims),
                _readable(x[PARAM], dims), dims, alpha,
            )  # fmt: skip
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        dims, alpha, present, *tensors = inputs
        count = len(alpha)
        x = split(FORWARD_BITS, present, count, tensors)
        ctx.dims, ctx.alpha, ctx.present = dims, alpha, present
        ctx.set_materialize_grads(False)
        # A gradient is needed again only for the derivative in a factor or a scale, a bias only
        # for that in a scale.
        needs = _needs(ctx, FORWARD_BITS, 3, count)
        keep_grad = [a or b or c for a, b, c in zip(needs[LEFT], needs[RIGHT], needs[SCALE], strict=True)]
        grads = [g if k else None for g, k in zip(x[GRAD], keep_grad, strict=True)]
        ctx.save_for_backward(*grads, *x[LEFT], *x[RIGHT], *x[BIAS], *x[SCALE])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        count = len(ctx.alpha)
        needs = _needs(ctx, FORWARD_BITS, 3, count)
        x = split(X_BITS, ctx.present, count, ctx.saved_tensors)
        wanted = tuple(
            0 if cotangents[i] is None else sum(bit for bit in X_BITS if needs[bit][i])
            for i in range(count)
        )
        gradients = _backward(ctx.dims, ctx.alpha, wanted, cotangents, x)
        gradients[PARAM] = [
            c if need else None for c, need in zip(cotangents, needs[PARAM], strict=True)
        ]
        return (None, None, None, *_flat(gradients, FORWARD_BITS, ctx.present))

    @staticmethod
    def vmap(info: Any, in_dims: Any, dims: Any, alpha: Any, present: int, *tensors: Any) -> Any:
        fold = Fold(info.batch_size, dims)
        x = split(FORWARD_BITS, present, len(alpha), tensors)
        d = split(FORWARD_BITS, present, len(alpha), in_dims[3:])
        # What is mapped by none and has no task axis stays shared.
        folded = {
            bit: [fold.operand(i, x[bit][i], d[bit][i], bit, share=bit not in (PARAM, GRAD))
                  for i in range(len(x[bit]))]
            for bit in FORWARD_BITS
        }  # fmt: skip
        out = call(KronForward, fold.dims, alpha, (), folded)
        shapes = [
            fold.logical_shape(x[GRAD][i], d[GRAD][i]) for i in range(len(alpha))
        ]
        return tuple(
            u.reshape(fold.size, *shape) for u, shape in zip(out, shapes, strict=True)
        ), (0,) * len(alpha)


def _backward(
    dims: Any, alpha: Any, wanted: tuple[int, ...], cotangents: Group, x: dict[int, Group]
) -> dict[int, list[Tensor | None]]:
    """The gradients by bit, from one call for all items that want any."""
    gradients: dict[int, list[Tensor | None]] = {bit: [None] * len(alpha) for bit in X_BITS}
    live = [i for i, bits in enumerate(wanted) if bits]
    if not live:
        return gradients
    if len(live) < len(alpha):
        dims = tuple(d for i in live for d in dims[4 * i : 4 * i + 4])
        alpha = tuple(alpha[i] for i in live)
        cotangents = [cotangents[i] for i in live]
        wanted = tuple(wanted[i] for i in live)
        x = {bit: [group[i] for i in live] if group else [] for bit, group in x.items()}
    inputs = {
        COTANGENT: cotangents,
        GRAD: _pick(x[GRAD], wanted, LEFT | RIGHT | SCALE),
        LEFT: x[LEFT],
        RIGHT: x[RIGHT],
        BIAS: _pick(x[BIAS], wanted, BIAS | SCALE),
        SCALE: x[SCALE],
    }
    out = iter(call(KronBackward, dims, alpha, (wanted,), inputs))
    for i, bits in zip(live, wanted, strict=True):
        for bit in X_BITS:
            if bits & bit:
                gradients[bit][i] = next(out)
    return gradients


def _flat(gradients: dict[int, Any], bits: Sequence[int], present: int) -> list[Tensor | None]:
    return [x for bit in bits if present & bit for x in gradients[bit]]


def _stand_in(group: Group, cotangents: Group) -> Group:
    """Gradients for the raw op, which reads only the shape of those that were not kept."""
    if not group:
        return cotangents
    return [c if g is None else g for g, c in zip(group, cotangents, strict=True)]


def _readable(group: Group, dims: Sequence[int]) -> Group:
    """Operands as the raw ops read them: in canonical shape with any strides, or without gaps."""
    return [
        x
        if x is None or x.is_contiguous() or x.shape == dims[4 * i + 4 - x.dim() : 4 * i + 4]
        else x.contiguous()
        for i, x in enumerate(group)
    ]


@with_eager_form
class KronBackward(Function):
    """The vector-Jacobian product of `KronForward`, for the bits in `wanted` of each item."""

    @staticmethod
    def forward(dims: Any, alpha: Any, present: int, wanted: Any, *tensors: Any) -> Any:
        x = split(BACKWARD_BITS, present, len(alpha), tensors)
        for bit in (COTANGENT, GRAD, SCALE):
            x[bit] = _readable(x[bit], dims)
        grads = _stand_in(x[GRAD], x[COTANGENT])
        return tuple(
            torch.ops.fastkfo.kron_backward.default(
                x[COTANGENT], grads, x[LEFT], x[RIGHT], x[BIAS], x[SCALE], dims, alpha, wanted
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.dims, ctx.alpha, ctx.present, ctx.wanted, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Any, ...]:
        count = len(ctx.alpha)
        needs = _needs(ctx, BACKWARD_BITS, 4, count)
        x = split(BACKWARD_BITS, ctx.present, count, ctx.saved_tensors)
        d: dict[int, list[Tensor | None]] = {bit: [None] * count for bit in X_BITS}
        outputs = iter(d_outputs)
        for i, bits in enumerate(ctx.wanted):
            for bit in X_BITS:
                if bits & bit:
                    d[bit][i] = next(outputs)
        wanted = tuple(
            sum(bit for bit in BACKWARD_BITS if needs[bit][i])
            if any(d[bit][i] is not None for bit in X_BITS)
            else 0
            for i in range(count)
        )
        inputs = {**x, **{bit << 8: d[bit] for bit in X_BITS}}
        out = iter(call(KronDoubleBackward, ctx.dims, ctx.alpha, (wanted,), inputs))
        gradients: dict[int, list[Tensor | None]] = {bit: [None] * count for bit in BACKWARD_BITS}
        for i, bits in enumerate(wanted):
            for bit in (*X_BITS, COTANGENT):
                if bits & bit:
                    gradients[bit][i] = next(out)
        return (None, None, None, None, *_flat(gradients, BACKWARD_BITS, ctx.present))

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, dims: Any, alpha: Any, present: int, wanted: Any, *tensors: Any
    ) -> Any:
        return _vmap_derivative(
            KronBackward, X_BITS, BACKWARD_BITS, info, in_dims, dims, alpha, present, wanted, tensors
        )


@with_eager_form
class KronDoubleBackward(Function):
    """The vector-Jacobian product of `KronBackward`."""

    @staticmethod
    def forward(dims: Any, alpha: Any, present: int, wanted: Any, *tensors: Any) -> Any:
        x = split(DOUBLE_BITS, present, len(alpha), tensors)
        for bit in (COTANGENT, GRAD, SCALE, GRAD << 8, SCALE << 8):
            x[bit] = _readable(x[bit], dims)
        grads = _stand_in(x[GRAD], x[COTANGENT])
        return tuple(
            torch.ops.fastkfo.kron_double_backward.default(
                x[COTANGENT], grads, *(x[bit] for bit in DOUBLE_BITS[2:]), dims, alpha, wanted
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.dims, ctx.alpha, ctx.present, ctx.wanted, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Any, ...]:
        given = [k for k, x in enumerate(ctx.saved_tensors) if x is not None]

        def formula(*tensors: Tensor) -> tuple[Tensor, ...]:
            full: list[Tensor | None] = [None] * len(ctx.saved_tensors)
            for k, x in zip(given, tensors, strict=True):
                full[k] = x
            return tuple(_reference(ctx.dims, ctx.alpha, ctx.present, ctx.wanted, full))

        _, vjp = torch.func.vjp(formula, *(ctx.saved_tensors[k] for k in given))
        gradients: list[Tensor | None] = [None] * len(ctx.saved_tensors)
        for k, x in zip(given, vjp(d_outputs), strict=True):
            gradients[k] = x
        return (None, None, None, None, *gradients)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, dims: Any, alpha: Any, present: int, wanted: Any, *tensors: Any
    ) -> Any:
        bits = (*X_BITS, COTANGENT)
        return _vmap_derivative(
            KronDoubleBackward, bits, DOUBLE_BITS, info, in_dims, dims, alpha, present, wanted, tensors
        )


def _reference(
    dims: Any, alpha: Any, present: int, wanted: Any, tensors: Sequence[Tensor | None]
) -> list[Tensor]:
    """KronDoubleBackward by the differentiable formula."""
    x = split(DOUBLE_BITS, present, len(alpha), tensors)
    out: list[Tensor] = []
    for i, bits in enumerate(wanted):
        if not bits:
            continue
        shape = dims[4 * i : 4 * i + 4]
        given = {bit: canonical(group[i], bit, shape) if group else None for bit, group in x.items()}
        cotangent = given[COTANGENT]
        assert cotangent is not None
        grad = torch.zeros_like(cotangent) if given[GRAD] is None else given[GRAD]
        operands = Operands(grad, *(given[bit] for bit in X_BITS[1:]))
        tangents = Operands(*(given[bit] for bit in TANGENT_BITS))
        to_cotangent, gradients = kron_double_backward(cotangent, operands, tangents, alpha[i])
        results = dict(zip(X_BITS, gradients, strict=True)) | {COTANGENT: to_cotangent}
        for bit in (*X_BITS, COTANGENT):
            if bits & bit:
                like = x[bit][i]
                result = results[bit]
                full = given[bit].shape  # type: ignore[union-attr]
                out.append(result.sum_to_size(full).reshape(like.shape))
    return out


def canonical(x: Tensor | None, bit: int, dims: Sequence[int]) -> Tensor | None:
    """An operand in its canonical shape: four axes, or three for a factor or a bias."""
    if x is None:
        return None
    tasks, batch, n, m = dims
    if bit >= 1 << 8:
        bit >>= 8
    if bit == SCALE:
        if x.numel() == 1:
            return x.reshape(1, 1, 1, 1)
        if x.dim() == 4 and tuple(x.shape[1:]) == (1, 1, 1):
            return x
    rows, cols = {LEFT: (n, n), RIGHT: (m, m)}.get(bit, (n, m))
    trailing = (rows, cols) if bit in (LEFT, RIGHT, BIAS) else (batch, rows, cols)
    one_task = 1
    for size in trailing:
        one_task *= size
    return x.reshape(tasks if x.numel() == tasks * one_task else 1, *trailing)


class Fold:
    """Moves the axis that vmap maps into the task axis: T tasks become size * T."""

    def __init__(self, size: int, dims: tuple[int, ...]) -> None:
        self.size = size
        self.old = dims
        self.dims = tuple(size * d if k % 4 == 0 else d for k, d in enumerate(dims))

    def operand(
        self, i: int, x: Tensor | None, in_dim: int | None, bit: int, share: bool
    ) -> Tensor | None:
        """Operand x of item i for size * T tasks; or as it is, if one for all and to be shared."""
        if x is None:
            return None
        shape = self.old[4 * i : 4 * i + 4]
        tasks = shape[0]
        if in_dim is None:
            one = canonical(x, bit, shape)
            assert one is not None
            if share and one.shape[0] == 1:
                return one
            one = one.expand(tasks, *one.shape[1:]).unsqueeze(0)
        else:
            moved = x.movedim(in_dim, 0)
            rows = [canonical_like(moved, bit, shape)]
            one = rows[0].expand(self.size, tasks, *rows[0].shape[2:])
        one = one.expand(self.size, *one.shape[1:])
        return one.reshape(self.size * tasks, *one.shape[2:])

    def logical_shape(self, x: Tensor, in_dim: int | None) -> tuple[int, ...]:
        """The shape of x as the mapped function sees it."""
        shape = list(x.shape)
        if in_dim is not None:
            del shape[in_dim]
        return tuple(shape)


def canonical_like(x: Tensor, bit: int, dims: Sequence[int]) -> Tensor:
    """`canonical` of x `[V, ...]`, keeping the mapped axis in front."""
    one = canonical(x[0], bit, dims) if x.shape[0] else None
    shape = one.shape if one is not None else canonical(x.new_empty(x.shape[1:]), bit, dims).shape  # type: ignore[union-attr]
    return x.reshape(x.shape[0], *shape)


def _vmap_derivative(
    function: Any,
    out_bits: Sequence[int],
    in_bits: Sequence[int],
    info: Any,
    in_dims: Any,
    dims: Any,
    alpha: Any,
    present: int,
    wanted: Any,
    tensors: Sequence[Any],
) -> Any:
    """A derivative under vmap: every operand gets its own row per mapped entry and task."""
    count = len(alpha)
    fold = Fold(info.batch_size, dims)
    x = split(in_bits, present, count, tensors)
    d = split(in_bits, present, count, in_dims[4:])
    folded = {
        bit: [fold.operand(i, x[bit][i], d[bit][i], bit, share=False) for i in range(len(x[bit]))]
        for bit in in_bits
    }
    # The raw ops tell a shared scale by its single number, so tasks of one need four axes.
    out = iter(call(function, fold.dims, alpha, (wanted,), folded))
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
