"""The Kronecker update of all parameters of a learner in one call.

One shape convention: a gradient is `[T?, B?, n, m]`, T tasks and a batch of B (a convolution's
output channels); factors are `[T?, n, n]` and `[T?, m, m]`. Source: Arnold, Iqbal, Sha, "When MAML
Can Adapt Fast and How to Assist When It Cannot", AISTATS 2021; docs/kron.md has the derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkfo import reference
from fastkfo.functional import checks
from fastkfo.functional.gram import gram_unchecked
from fastkfo.functional.kron_autograd import KronForward
from fastkfo.functional.kron_layout import (
    BIAS,
    GRAD,
    LEFT,
    PARAM,
    RIGHT,
    SCALE,
    Group,
    call,
    canonical,
)
from fastkfo.kernels import kron as kernels
from fastkfo.kernels import selector

Operands = Sequence["Tensor | None"] | None


def kron_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    left: Operands = None,
    right: Operands = None,
    bias: Operands = None,
    scale: Operands = None,
    *,
    lr: float | Tensor | Sequence[float | Tensor],
    psd: bool = False,
    implementation: str = "auto",
) -> list[Tensor]:
    """Update every parameter: `θ' = θ − lr · S ∘ (A G C + β)`.

    A is `left`, or `leftᵀ left` with `psd`; C is `right`, or `rightᵀ right`. An operand that is
    None is absent: the identity for a factor, zero for β, one for S. One call for all items, which
    may have unlike shapes; differentiable to any order in every tensor (first and second
    derivatives are fused kernels), under `torch.func`'s `grad`, `vmap` and their compositions too.
    Under autocast, operands of lower precision are promoted to float32.

    Args:
        params: θ, each of its gradient's shape (or of one task's: shared by all tasks).
        grads: G, `[T?, B?, n, m]`, or `[n]` for n × 1; any shape where there are no factors.
        left: L, `[T?, n, n]` (`[T?, r, n]` with `psd`), per item or None.
        right: R, `[T?, m, m]` (`[T?, r, m]` with `psd`), per item or None.
        bias: β, `[T?, n, m]`, per item or None.
        scale: S, broadcastable to the gradient, per item or None.
        lr: the learning rate: a finite number, a tensor broadcastable to each gradient, or a list
            with one of these per item. Gradients flow to tensors.
        psd: whether factors enter as `LᵀL` and `RᵀR`.
        implementation: "auto", "native", "triton" or "reference".

    Returns:
        The updated parameters, in the shape and dtype of the update; the arguments are unchanged.
        An item has a task axis where one of its factors or its bias has one.

    Raises:
        TypeError: an operand is no floating-point tensor, or an item mixes dtypes.
        ValueError: lengths, shapes or devices do not match; `lr` is not finite.
        ImplementationUnavailable: the implementation named is not available.
    """
    grads = checks.operand_list("grads", grads, len(grads) if _is_list(grads) else -1)
    params = checks.operand_list("params", params, len(grads))
    if any(param is None for param in params):
        raise TypeError("params: expected a tensor for every gradient, got None")
    rates = list(lr) if isinstance(lr, (list, tuple)) else [lr] * len(grads)
    if len(rates) != len(grads):
        raise ValueError(f"lr: expected one or {len(grads)} learning rates, got {len(rates)}")
    for i, rate in enumerate(rates):
        checks.finite(f"lr[{i}]" if isinstance(lr, (list, tuple)) else "lr", rate)
    return _run(params, grads, left, right, bias, scale, rates, psd, implementation)


def kron_transform(
    grads: Sequence[Tensor],
    left: Operands = None,
    right: Operands = None,
    bias: Operands = None,
    scale: Operands = None,
    *,
    psd: bool = False,
    implementation: str = "auto",
) -> list[Tensor]:
    """Transform every gradient: `U = S ∘ (A G C + β)`.

    As `kron_update`, without the update.

    Args:
        grads: G, `[T?, B?, n, m]`, or `[n]` for n × 1; any shape where there are no factors.
        left: L, `[T?, n, n]` (`[T?, r, n]` with `psd`), per item or None.
        right: R, `[T?, m, m]` (`[T?, r, m]` with `psd`), per item or None.
        bias: β, `[T?, n, m]`, per item or None.
        scale: S, broadcastable to the gradient, per item or None.
        psd: whether factors enter as `LᵀL` and `RᵀR`.
        implementation: "auto", "native", "triton" or "reference".

    Returns:
        The transformed gradients.

    Raises:
        TypeError: an operand is no floating-point tensor, or an item mixes dtypes.
        ValueError: lengths, shapes or devices do not match.
        ImplementationUnavailable: the implementation named is not available.
    """
    grads = checks.operand_list("grads", grads, len(grads) if _is_list(grads) else -1)
    return _run(None, grads, left, right, bias, scale, None, psd, implementation)


def _is_list(x: object) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, Tensor)


class _Item(NamedTuple):
    """One checked item; its gradient has the shape of the result."""

    dims: tuple[int, int, int, int]
    alpha: float
    operands: dict[int, Tensor | None]


def _run(
    params: list[Any] | None,
    grads: list[Any],
    left: Operands,
    right: Operands,
    bias: Operands,
    scale: Operands,
    rates: list[Any] | None,
    psd: bool,
    implementation: str,
) -> list[Tensor]:
    count = len(grads)
    if not isinstance(psd, bool):
        raise TypeError(f"psd: expected a bool, got {type(psd).__name__}")
    if implementation not in selector.IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: expected one of {selector.IMPLEMENTATIONS}, got {implementation!r}"
        )
    groups = {
        GRAD: grads,
        PARAM: params or [None] * count,
        LEFT: checks.operand_list("left", left, count),
        RIGHT: checks.operand_list("right", right, count),
        BIAS: checks.operand_list("bias", bias, count),
        SCALE: checks.operand_list("scale", scale, count),
    }
    items = [
        _check_item(i, {bit: g[i] for bit, g in groups.items()}, rates[i] if rates else None, psd)
        for i in range(count)
    ]
    if psd:
        slots = [
            (item.operands, bit)
            for item in items
            for bit in (LEFT, RIGHT)
            if item.operands[bit] is not None
        ]
        squares = gram_unchecked([operands[bit] for operands, bit in slots], implementation)  # type: ignore[misc]
        for (operands, bit), square in zip(slots, squares, strict=True):
            operands[bit] = square
    columns = {bit: [item.operands[bit] for item in items] for bit in groups}
    return kron_unchecked(
        tuple([d for item in items for d in item.dims]),
        tuple([item.alpha for item in items]),
        columns,
        implementation,
    )


_NAMES = {PARAM: "params", LEFT: "left", RIGHT: "right", BIAS: "bias", SCALE: "scale"}


def _check_item(i: int, x: dict[int, Any], rate: Any, psd: bool) -> _Item:
    """Check one item; the common case first, at a fraction of the cost of the others."""
    plain = None if isinstance(rate, Tensor) else _plain_item(x, rate)
    return _any_item(i, x, rate, psd) if plain is None else plain


def _plain_item(x: dict[int, Any], rate: float | None) -> _Item | None:
    """The item if it is one or more matrices with two square factors, and nothing to adjust."""
    grad, left, right, param = x[GRAD], x[LEFT], x[RIGHT], x[PARAM]
    if x[BIAS] is not None or x[SCALE] is not None or not isinstance(grad, Tensor):
        return None
    shape, dtype, device = grad.shape, grad.dtype, grad.device
    if len(shape) < 2 or dtype not in checks.DTYPES or checks.autocast_enabled(device):
        return None
    *batch, n, m = shape
    for operand, expected in ((left, (n, n)), (right, (m, m)), (param, shape)):
        if operand is None and operand is param:
            continue
        if not isinstance(operand, Tensor) or operand.shape != expected:
            return None
        if operand.dtype != dtype or operand.device != device:
            return None
    return _Item((1, math.prod(batch), n, m), 1.0 if rate is None else -float(rate), x)


def _any_item(i: int, x: dict[int, Any], rate: Any, psd: bool) -> _Item:
    grad = x[GRAD]
    checks.floating_tensor("grads", grad, i)
    names = _NAMES
    for bit, name in names.items():
        if x[bit] is not None:
            checks.floating_tensor(name, x[bit], i)
    alpha = 1.0 if rate is None else -1.0
    if isinstance(rate, Tensor):
        names = {**_NAMES, SCALE: "lr" if x[SCALE] is None else "lr * scale"}
        x[SCALE] = rate if x[SCALE] is None else _rate_times_scale(i, rate, x[SCALE])
    elif rate is not None:
        alpha = -float(rate)
    if checks.autocast_enabled(grad.device):
        x = _promoted(x)
        grad = x[GRAD]
    for bit, name in names.items():
        if x[bit] is not None:
            checks.same_dtype_and_device(name, x[bit], "grads", grad, i)

    logical, matrix, tasks = _logical_shape(i, x)
    if x[LEFT] is None and x[RIGHT] is None and x[BIAS] is None:
        n, m, batch = 1, math.prod(logical), 1
    elif len(matrix) == 1:
        n, m, batch = matrix[0], 1, 1
    elif len(matrix) >= 2:
        n, m, batch = matrix[-2], matrix[-1], math.prod(matrix[:-2])
    else:
        raise ValueError(f"grads[{i}]: expected [T?, B?, n, m] beside factors, got a scalar")
    _check_factor("left", i, x[LEFT], n, psd)
    _check_factor("right", i, x[RIGHT], m, psd)
    if x[BIAS] is not None and tuple(x[BIAS].shape[-2:]) != (n, m):
        raise ValueError(f"bias[{i}]: expected [T?, {n}, {m}], got {list(x[BIAS].shape)}")
    x[GRAD] = grad if grad.shape == logical else grad.expand(logical)
    if x[PARAM] is not None:
        x[PARAM] = _broadcast("params", i, x[PARAM], logical)
    if x[SCALE] is not None and x[SCALE].numel() != 1:
        x[SCALE] = _broadcast(names[SCALE], i, x[SCALE], logical)
    return _Item((tasks, batch, n, m), alpha, x)


def _rate_times_scale(i: int, rate: Tensor, scale: Tensor) -> Tensor:
    try:
        return rate * scale
    except RuntimeError:
        raise ValueError(
            f"lr: expected a tensor that broadcasts with scale[{i}], {list(scale.shape)} on "
            f"{scale.device}, got {list(rate.shape)} on {rate.device}"
        ) from None


def _logical_shape(i: int, x: dict[int, Any]) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """The shape of an item's result, the part of it that is one task, and T."""
    shape = tuple(x[GRAD].shape)
    tasks = _tasks(i, x)
    if tasks is None:
        return shape, shape, 1
    if len(shape) < 3:
        return (tasks, *shape), shape, tasks
    if shape[0] not in (1, tasks):
        raise ValueError(f"grads[{i}]: expected {tasks} tasks on the first axis, got {list(shape)}")
    return (tasks, *shape[1:]), shape[1:], tasks


def _promoted(x: dict[int, Any]) -> dict[int, Any]:
    low = (torch.bfloat16, torch.float16)
    return {bit: t.float() if t is not None and t.dtype in low else t for bit, t in x.items()}


def _tasks(i: int, x: dict[int, Any]) -> int | None:
    """T, where a factor or the bias of the item has a task axis."""
    tasks = None
    for bit in (LEFT, RIGHT, BIAS):
        operand = x[bit]
        if operand is None:
            continue
        if operand.dim() not in (2, 3):
            raise ValueError(
                f"{_NAMES[bit]}[{i}]: expected two axes, or three with tasks first, "
                f"got {list(operand.shape)}"
            )
        if operand.dim() == 3:
            if tasks not in (None, operand.shape[0]):
                raise ValueError(
                    f"{_NAMES[bit]}[{i}]: expected {tasks} tasks as in the other operands, "
                    f"got {list(operand.shape)}"
                )
            tasks = operand.shape[0]
    return tasks


def _check_factor(name: str, i: int, factor: Tensor | None, size: int, psd: bool) -> None:
    if factor is None:
        return
    rows, cols = factor.shape[-2:]
    if cols != size or (rows != size and not psd):
        expected = f"[T?, {'r' if psd else size}, {size}]"
        raise ValueError(f"{name}[{i}]: expected {expected}, got {list(factor.shape)}")


def _broadcast(name: str, i: int, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if x.shape == shape:
        return x
    try:
        return x.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name}[{i}]: expected a shape that broadcasts to {list(shape)}, got {list(x.shape)}"
        ) from None


def kron_unchecked(
    dims: tuple[int, ...],
    alpha: tuple[float, ...],
    groups: Mapping[int, Group],
    implementation: str = "auto",
) -> list[Tensor]:
    """`θ + α S ∘ (A G C + β)` for operands known to be right.

    Args:
        dims: T, B, n, m of every item.
        alpha: α of every item.
        groups: by bit (PARAM, GRAD, LEFT, RIGHT, BIAS, SCALE), one operand or None per item, in
            canonical shape or any other with as many elements; A and C as they are multiplied.
        implementation: as for `kron_update`.

    Returns:
        One tensor per item, in the shape of its gradient.
    """
    grads = groups[GRAD]
    if not grads:
        return []
    ids = checks.by_dtype_and_device(grads)  # type: ignore[arg-type]
    if len(ids) > 1:
        return checks.scatter(ids, lambda part: _some(part, dims, alpha, groups, implementation))
    device = grads[0].device  # type: ignore[union-attr]
    how = selector.select(implementation, device, "kron")
    if how != "reference" and device.type != "cpu":
        large = [i for i in range(len(grads)) if _for_blas(dims[4 * i : 4 * i + 4], groups, i)]
        if large and len(large) < len(grads):
            small = [i for i in range(len(grads)) if i not in large]
            return checks.scatter(
                [small, large], lambda part: _some(part, dims, alpha, groups, implementation)
            )
        how = "reference" if large else how
    if how == "reference":
        items = [{b: g[i] for b, g in groups.items() if g} for i in range(len(grads))]
        with checks.without_autocast(device):
            return [
                _reference(dims[4 * i : 4 * i + 4], alpha[i], item) for i, item in enumerate(items)
            ]
    return list(call(KronForward, dims, alpha, (how,), groups))


def _for_blas(dims: Sequence[int], groups: Mapping[int, Group], i: int) -> bool:
    """Whether an item's products are better left to cuBLAS."""
    factors = any([bool(groups.get(b)) and groups[b][i] is not None for b in (LEFT, RIGHT)])
    tasks, batch, n, m = dims
    return kernels.for_blas(tasks, batch, n, m, factors)


def _some(
    part: list[int],
    dims: tuple[int, ...],
    alpha: tuple[float, ...],
    groups: Mapping[int, Group],
    implementation: str,
) -> list[Tensor]:
    """`kron_unchecked` of some of the items."""
    return kron_unchecked(
        tuple([d for i in part for d in dims[4 * i : 4 * i + 4]]),
        tuple([alpha[i] for i in part]),
        {bit: [g[i] for i in part] for bit, g in groups.items() if g},
        implementation,
    )


def _reference(dims: Sequence[int], alpha: float, x: dict[int, Tensor | None]) -> Tensor:
    """One item by the formula, in float32 for dtypes of lower precision."""
    grad = x[GRAD]
    assert grad is not None
    low = grad.dtype in (torch.bfloat16, torch.float16)
    c = {
        bit: None if t is None else canonical(t.float() if low else t, bit, dims)
        for bit, t in x.items()
    }
    u = reference.kron.kron_transform(
        reference.kron.Operands(*(c.get(bit) for bit in (GRAD, LEFT, RIGHT, BIAS, SCALE)))
    )
    if u is c[GRAD]:  # nothing to do: a result is never an argument
        u = u.clone()
    if alpha != 1.0:
        u = alpha * u
    param = c.get(PARAM)
    if param is not None:
        u = param + u
    return u.reshape(grad.shape).to(grad.dtype)
