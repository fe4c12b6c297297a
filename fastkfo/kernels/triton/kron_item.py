"""One item of a call of the Kronecker ops: what its operands may be, and how the kernels see them.

csrc/library.cpp has the lists that a call is made of, csrc/cpu/operand.h the shapes that an operand
may have: that of its axes, 1 for any that is shared; a trailing part of it; or any shape with as
many elements, or as many as one task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from fastkfo.kernels.triton import launch

GRAD, LEFT, RIGHT, BIAS, SCALE, COTANGENT = 1, 2, 4, 8, 16, 32
# Of these, an operand has a gradient (in the order in which an op returns them).
NAMED = {
    GRAD: "grads", LEFT: "left", RIGHT: "right", BIAS: "bias", SCALE: "scale",
    COTANGENT: "cotangents",
}  # fmt: skip

Group = Sequence["Tensor | None"]


class Operand(NamedTuple):
    """An operand `[T or 1, ...]`, no gaps within a task; `stride` leads to the next, or is 0."""

    data: Tensor | None = None
    stride: int = 0


class Item(NamedTuple):
    """One checked item. `full`: S is not one number (of a task)."""

    dims: tuple[int, int, int, int]
    alpha: float
    wanted: int
    full: bool
    given: dict[str, Tensor]  # as they came
    x: dict[str, Operand]  # as the kernels see them; absent ones are there, and empty

    def present(self, *names: str) -> bool:
        """Whether any of these operands is."""
        return any(name in self.given for name in names)

    def shared(self, bit: int) -> bool:
        """Whether an operand is one for all tasks, so that its gradients are summed over these."""
        x = self.given[NAMED[bit]]
        return x.numel() != self.dims[0] * self.size(bit)

    def size(self, bit: int) -> int:
        """The elements of one task's operand."""
        _, b, n, m = self.dims
        scale = b * n * m if self.full else 1
        return {LEFT: n * n, RIGHT: m * m, BIAS: n * m, SCALE: scale}.get(bit, b * n * m)


def items(
    groups: Mapping[str, Group],
    dims: Sequence[int],
    alpha: Sequence[float],
    wanted: Sequence[int] | None = None,
) -> list[Item]:
    """Check a call, and take it apart.

    Args:
        groups: the lists of operands by name; an empty one (but of `grads` and `cotangents`): all
            are absent.
        dims: T, B, n, m of every item.
        alpha: one number per item.
        wanted: one bit mask per item; None: of the forward op.

    Returns:
        The items.

    Raises:
        TypeError: dtypes that the kernels have not, or more than one of them.
        ValueError: lengths, sizes, devices; a gradient that is wanted of what is absent.
    """
    count = len(groups["grads"])
    lists = {"dims": (dims, 4), "alpha": (alpha, 1)}
    if wanted is not None:
        lists["wanted"] = (wanted, 1)
    for name, (values, each) in lists.items():
        if len(values) != each * count:
            raise ValueError(
                f"{name}: expected {each} for each of {count} items, got {len(values)}"
            )
    for name, group in groups.items():
        if len(group) != count and (len(group) or name in ("grads", "cotangents")):
            raise ValueError(f"{name}: expected {count} operands, got {len(group)}")
    like = groups["grads"][0] if count else None
    return [
        _item(
            i,
            {name: group[i] for name, group in groups.items() if group and group[i] is not None},
            tuple(dims[4 * i : 4 * i + 4]),
            alpha[i],
            0 if wanted is None else wanted[i],
            list(groups),
            like,
        )
        for i in range(count)
    ]


def _item(i, given, dims, alpha, wanted, names, like):  # type: ignore[no-untyped-def]
    if min(dims) < 0:
        raise ValueError(f"dims: expected sizes of item {i}, got {list(dims)}")
    for name, x in given.items():
        launch.check_operand(f"{name}[{i}]", x, like)
    t, b, n, m = dims
    full = "scale" in given and not _one_number(given["scale"])
    elements = (t, b, n, m)
    shapes: dict[str, tuple[int, ...]] = {"left": (t, n, n), "right": (t, m, m), "bias": (t, n, m)}
    shapes["scale"] = elements if full else (t, 1, 1, 1)
    x = {}
    for name in names:
        shape = shapes.get(name.removeprefix("d_"), elements)
        x[name] = _operand(f"{name}[{i}]", given[name], shape) if name in given else Operand()
    item = Item(dims, float(alpha), wanted, full, given, x)
    for name in ("grads", "cotangents"):
        if name in names and given[name].numel() != math.prod(dims):
            raise ValueError(
                f"{name}[{i}]: expected {math.prod(dims)} elements, got {given[name].numel()}"
            )
    every = GRAD | LEFT | RIGHT | BIAS | SCALE | (COTANGENT if "d_grads" in names else 0)
    if wanted & ~every:
        raise ValueError(f"wanted[{i}]: expected bits among {every}, got {wanted}")
    for bit in bits(wanted):
        _check_wanted(i, item, bit)
    return item


def bits(wanted: int) -> list[int]:
    """The bits that are set, in the order in which an op returns what they stand for."""
    return [bit for bit in NAMED if wanted & bit]


def _one_number(scale: Tensor) -> bool:
    """Whether S is one number, or one for each task (which takes four axes to say)."""
    return scale.numel() == 1 or (scale.dim() == 4 and tuple(scale.shape[1:]) == (1, 1, 1))


def _check_wanted(i: int, item: Item, bit: int) -> None:
    name, size = NAMED[bit], item.size(bit)
    if name not in item.given:
        raise ValueError(f"wanted[{i}]: expected bits of operands that are there, got {name}")
    if item.given[name].numel() not in (size, item.dims[0] * size):
        raise ValueError(
            f"{name}[{i}]: expected {size} or {item.dims[0] * size} elements, as its gradient is "
            f"wanted, got {item.given[name].numel()}"
        )


def _operand(name: str, x: Tensor, shape: tuple[int, ...]) -> Operand:
    """As `[T or 1, ...]`, with no gaps within a task."""
    x = x.resolve_neg()  # a kernel reads memory, not views
    sizes = tuple(x.shape)
    axes = shape[len(shape) - len(sizes) :]
    one = math.prod(shape[1:])
    if len(sizes) <= len(shape) and all(s in (1, d) for s, d in zip(sizes, axes, strict=True)):
        tasks = sizes[0] if len(sizes) == len(shape) else 1
        x = x.expand(tasks, *shape[1:])
    elif x.numel() in (one, shape[0] * one):
        x = x.reshape(shape[0] if x.numel() == shape[0] * one else 1, *shape[1:])
    else:
        raise ValueError(
            f"{name}: expected {shape[0] * one} or {one} elements for {list(shape)}, "
            f"got {list(sizes)}"
        )
    if x.shape[0] > 1 and x.stride(0) == 0:
        x = x[:1]
    if x.numel() and not x[0].is_contiguous():
        x = x.contiguous()
    return Operand(x, 0 if x.shape[0] == 1 else x.stride(0))
