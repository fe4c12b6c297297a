"""One grid of cases for the fused ops, and operands built from it.

A gradient is `[T?, B?, n, m]`. An operand of an item is None (absent), "shared" (one for all tasks)
or "tasks" (one per task).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkfo.kernels import selector

NAMES = ("params", "grads", "left", "right", "bias", "scale")


def implementations(op: str = "") -> list[str]:
    """Those of an op that run somewhere on this machine: without libraries, the reference alone."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    names = ("native", "triton", "reference")
    return [x for x in names if any(selector.unavailable(x, d, op) is None for d in devices)]


IMPLEMENTATIONS = implementations("kron")
HAS_NATIVE = selector.unavailable("native", "cpu") is None
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="needs the native library")


def skip_unless_available(implementation: str, device: torch.device, op: str = "kron") -> None:
    """Skip a test whose implementation runs on this machine, but not on this device."""
    why = selector.unavailable(implementation, device.type, op)
    if why:
        pytest.skip(why)


def every_fifth(*axes: Iterable[Any]) -> list[Any]:
    """Rows of the axes' product for parametrize, of which the second pass takes one in five.

    Where what the other rows add is the same on the reference. Every value is in some row that it
    takes, which wants axes of no multiple of five values, and some dozens of rows.
    """
    rows = list(itertools.product(*axes))
    for axis, taken in zip(axes, zip(*rows[::5], strict=True), strict=True):
        assert set(axis) == set(taken)
    slow = pytest.mark.slow
    return [pytest.param(*row, marks=[slow] if k % 5 else []) for k, row in enumerate(rows)]


@dataclasses.dataclass(frozen=True)
class Item:
    """One parameter: its gradient's shape, which operands it has, and how they lie in memory."""

    shape: tuple[int, ...]
    left: str | None = "shared"
    right: str | None = "shared"
    bias: str | None = "shared"
    scale: tuple[int, ...] | None = None
    tasks: int | None = None
    rows: int | None = None  # of rectangular factors, with psd
    param: tuple[int, ...] | None = None  # its shape, where it is not the update's
    layout: str = "contiguous"

    @property
    def matrix(self) -> tuple[int, int]:
        """The n and m of the gradient, seen as a matrix of one task and one batch entry."""
        inner = self.shape[1:] if self.tasks is not None and len(self.shape) > 2 else self.shape
        return (inner[-2], inner[-1]) if len(inner) > 1 else (inner[0] if inner else 1, 1)

    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """The shape of every operand, None for an absent one."""
        n, m = self.matrix

        def factor(kind: str | None, rows: int, cols: int) -> tuple[int, ...] | None:
            if kind is None:
                return None
            return (self.tasks, rows, cols) if kind == "tasks" else (rows, cols)  # type: ignore[return-value]

        return {
            "params": self.shape if self.param is None else self.param,
            "grads": self.shape,
            "left": factor(self.left, n if self.rows is None else self.rows, n),
            "right": factor(self.right, m if self.rows is None else self.rows, m),
            "bias": factor(self.bias, n, m),
            "scale": self.scale,
        }


@dataclasses.dataclass(frozen=True)
class Case:
    """A list of items for one call. `lr`: "float", "scalar", "elementwise", "list"."""

    name: str
    items: tuple[Item, ...]
    psd: bool = False
    lr: str = "float"
    heavy: bool = False  # too large for third derivatives

    def __str__(self) -> str:
        return self.name


def _presence() -> list[Case]:
    """Each of left, right, bias and scale present or absent."""
    cases = []
    for mask in range(16):
        present = [bool(mask >> k & 1) for k in range(4)]
        name = "".join(letter for letter, is_there in zip("lrbs", present, strict=True) if is_there)
        kinds = ["shared" if is_there else None for is_there in present[:3]]
        item = Item((2, 3, 5), *kinds, scale=(2, 3, 5) if present[3] else None)
        cases.append(Case(f"operands_{name or 'none'}", (item,)))
    return cases


_LAYOUTS = ("transposed", "gaps", "expanded", "channels_last", "offset")
_T = "tasks"

CASES = [
    *_presence(),
    *(Case(f"{x}", (Item((4, 3, 5, 2), scale=(4, 3, 5, 2), layout=x),)) for x in _LAYOUTS),
    *(
        Case(f"{x}_tasks", (Item((2, 3, 5, 7), _T, _T, _T, (2, 3, 5, 7), 2, layout=x),), psd=True)
        for x in _LAYOUTS
    ),
    Case("matrix_17x13", (Item((17, 13)),)),
    Case("matrix_1x9_and_9x1", (Item((1, 9)), Item((9, 1)))),
    Case("vector", (Item((7,)), Item((7,), right=None, scale=(7,)), Item((1,)))),
    Case("scalar", (Item((), None, None, None, scale=()), Item((), None, None, None))),
    Case("size_1", (Item((1, 1)), Item((1, 1, 1, 1), _T, _T, _T, (1, 1, 1, 1), 1))),
    Case("conv_8x3x3x3", (Item((8, 3, 3, 3)), Item((8,), right=None)), psd=True),
    Case("conv_33x5x9", (Item((33, 5, 9), scale=(1,)),)),
    Case("five_axes", (Item((2, 2, 3, 3, 2)), Item((2, 3, 2, 1, 3), None, None, None))),
    Case(
        "ragged",
        (Item((5, 3)), Item((5,), right=None), Item((4, 5, 3, 3)), Item((2, 4), None)),
        True,
    ),
    Case("psd_tall", (Item((6, 4), rows=9), Item((2, 4, 5), rows=7)), psd=True),
    Case("psd_wide", (Item((6, 4), rows=2), Item((6, 4), rows=1, tasks=3, right=_T)), psd=True),
    Case("psd_no_rows", (Item((3, 4), rows=0),), psd=True),
    Case("empty_n", (Item((0, 4)), Item((0,), right=None))),
    Case("empty_m", (Item((3, 0), scale=(3, 0)), Item((2, 3, 0)))),
    Case("empty_batch", (Item((0, 3, 4)), Item((2, 0, 3, 4), _T, "shared", _T, None, 2))),
    Case("empty_tasks", (Item((0, 3, 4), _T, "shared", _T, (0, 3, 4), 0), Item((3, 4))), psd=True),
    Case("empty_among_others", (Item((4, 3)), Item((0, 3)), Item((2, 0, 3)), Item((5,)))),
    Case("tasks_all", (Item((3, 4, 5), _T, _T, _T, (3, 4, 5), 3),)),
    Case("tasks_left", (Item((3, 2, 4, 5), _T, "shared", "shared", None, 3),), psd=True),
    Case("tasks_right", (Item((3, 2, 4, 5), "shared", _T, None, (3, 1, 1, 1), 3),)),
    Case("tasks_bias", (Item((3, 2, 4, 5), None, "shared", _T, (2, 4, 5), 3),)),
    Case("tasks_one_grad", (Item((1, 2, 4, 5), _T, _T, None, tasks=3),)),
    Case("tasks_no_axis_in_grad", (Item((4, 5), _T, None, None, tasks=3, param=(4, 5)),)),
    Case("tasks_vector", (Item((6,), _T, None, _T, tasks=2),)),
    Case("tasks_shared_param", (Item((3, 4, 5), _T, _T, None, tasks=3, param=(4, 5)),), psd=True),
    Case(
        "param_broadcast", (Item((3, 4, 5), param=(5,)), Item((2, 3), None, None, None, param=(1,)))
    ),
    Case("scale_row", (Item((3, 4, 5), scale=(5,)), Item((4, 5), scale=(4, 1)))),
    Case("scale_one", (Item((3, 4), scale=()), Item((3, 4), scale=(1, 1)), Item((3,), scale=(1,)))),
    *(
        Case(f"lr_{kind}", (Item((4, 3)), Item((2, 3, 2), scale=(2, 3, 2)), Item((5,))), lr=kind)
        for kind in ("scalar", "elementwise", "list")
    ),
    # Across the threshold of BLAS (192^3 operations), and just below it.
    Case("blas_193x200", (Item((193, 200)), Item((40, 3))), heavy=True),
    Case("blas_transposed", (Item((200, 194), scale=(200, 194), layout="transposed"),), heavy=True),
    Case("blas_tasks", (Item((4, 192, 193), _T, "shared", None, None, 4),), psd=True, heavy=True),
    Case("below_blas", (Item((191, 191), bias=None),), heavy=True),
    # Several chunks of the batch, each a unit of its own (csrc/cpu/kron_item.h).
    Case("chunks", (Item((150, 41, 43), scale=(1,)),), heavy=True),
    Case("chunks_tasks", (Item((2, 90, 37, 50), _T, "shared", _T, (90, 37, 50), 2),), heavy=True),
]
SMALL = [case for case in CASES if not case.heavy]
GRAM_SHAPES = {
    "square": [(5, 5)],
    "ragged": [(7, 3), (2, 9), (1, 1), (1, 6), (6, 1)],
    "leading_axes": [(3, 4, 5), (2, 3, 4, 5), (2, 1, 2, 3, 2)],
    "empty": [(0, 4), (4, 0), (0, 3, 3), (2, 0, 3), (0, 0)],
    "many_axes": [(1, 2, 1, 2, 1, 2, 1, 2, 3, 2)],
    "wide": [(17, 33), (33, 17), (129, 65)],
    "blas": [(200, 190), (193, 193)],
    "blas_tasks": [(3, 193, 192)],
}


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x in other strides; "expanded" repeats the first of the last axis but one."""
    if layout == "contiguous" or x.dim() == 0:
        return x
    if layout == "channels_last":
        if x.dim() == 5:  # tasks of images
            return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    if layout == "offset":  # an address that no vector instruction calls aligned
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if layout == "gaps":  # what lies between the elements must not be read
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "expanded":
        return x.narrow(max(0, x.dim() - 2), 0, 1).expand(x.shape) if x.numel() else x
    if layout == "transposed":
        return x.mT.contiguous().mT if x.dim() > 1 else x
    raise AssertionError(layout)


@dataclasses.dataclass
class Operands:
    """The arguments of one call: a list per name, an entry per item, None for what is absent."""

    lists: dict[str, list[Tensor | None]]
    lr: float | Tensor | list[float | Tensor]
    psd: bool

    def tensors(self) -> list[Tensor]:
        """Every tensor, in a fixed order."""
        rates = self.lr if isinstance(self.lr, list) else [self.lr]
        every = [x for name in NAMES for x in self.lists[name]] + list(rates)  # type: ignore[list-item]
        return [x for x in every if isinstance(x, Tensor)]

    def map(self, f: Callable[[Tensor], Tensor]) -> Operands:
        """The same operands, each passed through `f` once, in the order of `tensors`."""

        def one(x):
            return f(x) if isinstance(x, Tensor) else x

        lists = {name: [one(x) for x in self.lists[name]] for name in NAMES}
        lr = [one(x) for x in self.lr] if isinstance(self.lr, list) else one(self.lr)
        return Operands(lists, lr, self.psd)

    def leaves(self) -> Operands:
        """Copies in the same strides that require gradients."""
        return self.map(lambda x: x.detach().requires_grad_())

    def dense(self) -> Operands:
        """Copies in float64 without gaps."""
        return self.map(lambda x: x.detach().double().contiguous().clone())

    def rates(self) -> list[float | Tensor]:
        """One learning rate per item."""
        return self.lr if isinstance(self.lr, list) else [self.lr] * len(self.lists["grads"])

    def update(self, op: Callable[..., list[Tensor]], **options: object) -> list[Tensor]:
        """`op` is kron_update, or has its arguments."""
        lists = [self.lists[name] for name in NAMES]
        return op(*lists, lr=self.lr, psd=self.psd, **options)

    def transform(self, op: Callable[..., list[Tensor]], **options: object) -> list[Tensor]:
        """`op` is kron_transform, or has its arguments."""
        return op(*[self.lists[name] for name in NAMES[1:]], psd=self.psd, **options)


def operands(
    case: Case, dtype: torch.dtype = torch.float64, device: object = "cpu", seed: int = 0
) -> Operands:
    """The operands of a case: the same values for every dtype and device, about one in size."""
    generator = torch.Generator().manual_seed(seed)

    def build(name: str, shape: tuple[int, ...] | None, layout: str) -> Tensor | None:
        if shape is None:
            return None
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name in ("left", "right"):
            x = x / max(1, shape[-1]) ** 0.5
        # Exact in every dtype under test: only what an op computes may differ.
        return lay_out(x.to(torch.bfloat16).to(device=device, dtype=dtype), layout)  # type: ignore[arg-type]

    lists: dict[str, list[Tensor | None]] = {name: [] for name in NAMES}
    for item in case.items:
        for name, shape in item.shapes().items():
            lists[name].append(build(name, shape, item.layout))
    lr: float | Tensor | list[float | Tensor] = 0.25
    if case.lr == "scalar":
        lr = torch.tensor(0.25, dtype=dtype, device=device)  # type: ignore[call-overload]
    elif case.lr == "elementwise":
        lr = [build("lr", item.shape, "contiguous") for item in case.items]  # type: ignore[misc]
    elif case.lr == "list":
        kinds = (0.5, torch.tensor(0.125, dtype=dtype, device=device), 1)  # type: ignore[call-overload]
        lr = [kinds[i % 3] for i in range(len(case.items))]
    return Operands(lists, lr, case.psd)
