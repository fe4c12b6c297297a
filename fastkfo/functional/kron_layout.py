"""How a call of the Kronecker ops is laid out, and how an axis that vmap maps folds into it.

A call is `(dims, alpha, present, *tensors)`: dims T B n m and one alpha per item, then the groups
of operands that `present` has bits for, each with one tensor or None per item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastkfo.functional.function import apply, cached
from fastkfo.kernels.fakes import BIAS, COTANGENT, GRAD, LEFT, RIGHT, SCALE

PARAM = 64
X_BITS = (GRAD, LEFT, RIGHT, BIAS, SCALE)
FORWARD_BITS = (PARAM, *X_BITS)
BACKWARD_BITS = (COTANGENT, *X_BITS)
TANGENT_BITS = tuple(bit << 8 for bit in X_BITS)
DOUBLE_OUT = (*X_BITS, COTANGENT)  # in the order of the bits, as the raw op returns them
DOUBLE_BITS = (*BACKWARD_BITS, *TANGENT_BITS)

Group = Sequence[Tensor | None]


def call(
    function: Any,
    dims: tuple[int, ...],
    alpha: tuple[float, ...],
    extra: tuple[Any, ...],
    groups: Mapping[int, Group],
) -> tuple[Tensor, ...]:
    """Apply a Function to groups of operands, in the order of their bits."""
    present = 0
    tensors: list[Tensor | None] = []
    for bit in DOUBLE_BITS if COTANGENT in groups else FORWARD_BITS:
        group = groups.get(bit)
        if group and any(x is not None for x in group):
            present |= bit
            tensors.extend(group)
    return apply(function, dims, alpha, present, *extra, *tensors)


@cached
def slices(bits: tuple[int, ...], present: int, count: int) -> tuple[slice, ...]:
    """Where each group of operands is; an empty slice for an absent one."""
    slices, k = [], 0
    for bit in bits:
        size = count if present & bit else 0
        slices.append(slice(k, k + size))
        k += size
    return tuple(slices)


def split(bits: tuple[int, ...], present: int, count: int, tensors: Sequence[Any]) -> list[Any]:
    """The groups of operands in the order of `bits`; an empty one for an absent one."""
    return [tensors[s] for s in slices(bits, present, count)]


def by_bit(
    bits: tuple[int, ...], present: int, count: int, tensors: Sequence[Any]
) -> dict[int, Any]:
    """The groups of operands by bit."""
    return dict(zip(bits, split(bits, present, count, tensors), strict=True))


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


def canonical_like(x: Tensor, bit: int, dims: Sequence[int]) -> Tensor:
    """`canonical` of x `[V, ...]`, keeping the mapped axis in front."""
    one = canonical(x[0], bit, dims) if x.shape[0] else None
    shape = one.shape if one is not None else canonical(x.new_empty(x.shape[1:]), bit, dims).shape  # type: ignore[union-attr]
    return x.reshape(x.shape[0], *shape)


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
