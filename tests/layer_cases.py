"""One grid of cases for the ops of convolutional learners, and PyTorch's own op per task as oracle.

A case is an op's operands by shape, `[T, ...]`, and its options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkfo import functional
from tests.cases import lay_out


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """One call of an op.

    Attributes:
        name: for people.
        op: a name in `fastkfo.functional`.
        shapes: of the operands, None for an absent one.
        options: of the op.
        layout: of the first operand in memory, see `lay_out`.
        small: whether derivatives are checked by finite differences, too.
    """

    name: str
    op: str
    shapes: tuple[tuple[int, ...] | None, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    layout: str = "contiguous"
    small: bool = False

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def operands(self, dtype: torch.dtype = torch.float64, device: Any = "cpu") -> list[Any]:
        """Numbers about one in size, exact in every dtype, that require gradients."""
        generator = torch.Generator().manual_seed(0)
        made: list[Any] = []
        for k, shape in enumerate(self.shapes):
            if shape is None:
                made.append(None)
                continue
            x = torch.randn(shape, generator=generator).bfloat16().to(device, dtype)
            x = lay_out(x, self.layout) if k == 0 else x
            made.append(x.detach().requires_grad_())
        return made

    def run(self, operands: list[Any], implementation: str = "auto") -> Tensor:
        """The op."""
        options = dict(self.options)
        if self.op != "linear":
            options["implementation"] = implementation
        result = getattr(functional, self.op)(*operands, **options)
        return result.y if self.op == "batch_norm" else result

    def oracle(self, operands: list[Any]) -> Tensor:
        """PyTorch's op, task after task."""
        tasks = [[None if x is None else x[t] for x in operands] for t in range(len(operands[0]))]
        rows = [ORACLES[self.op](*of_task, **self.options) for of_task in tasks]
        return torch.stack(rows)


def _batch_norm(
    x: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, relu: bool = False
) -> Any:
    if weight is None and bias is not None:  # PyTorch's second derivative fails without a weight
        weight = torch.ones_like(bias)
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    return torch.relu(y) if relu else y


def _layer_norm(x: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


ORACLES: dict[str, Callable[..., Any]] = {
    "conv2d": F.conv2d,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "max_pool2d": F.max_pool2d,
    "avg_pool2d": F.avg_pool2d,
    "linear": F.linear,
}


def _conv(name: str, x: Any, weight: Any, *, bias: bool = True, layout: str = "contiguous",
          small: bool = False, **options: Any) -> LayerCase:  # fmt: skip
    shapes = (x, weight, weight[:2] if bias else None)
    return LayerCase(name, "conv2d", shapes, options, layout, small)


CONV = [
    _conv("plain", (2, 3, 4, 5, 6), (2, 5, 4, 3, 3), padding=1, small=True),
    _conv("stride_2", (2, 2, 8, 7, 7), (2, 6, 8, 3, 3), stride=2, padding=1),
    _conv("rectangular", (2, 2, 3, 6, 4), (2, 4, 3, 3, 2), stride=(2, 1), padding=(1, 0)),
    _conv("dilated", (1, 2, 9, 9, 8), (1, 3, 9, 3, 3), dilation=(2, 3), padding=2),
    _conv("groups", (2, 2, 6, 5, 5), (2, 9, 2, 3, 3), groups=3, padding=1, small=True),
    _conv("depthwise", (2, 1, 5, 4, 4), (2, 5, 1, 3, 3), groups=5, bias=False),
    _conv("wide", (1, 2, 33, 4, 4), (1, 70, 33, 3, 3), padding=1),
    _conv("whole_vectors", (2, 3, 32, 6, 6), (2, 64, 32, 3, 3), padding=1, bias=False),
    _conv("one_channel", (3, 2, 1, 8, 8), (3, 16, 1, 3, 3), stride=2, padding=1),
    _conv("three_channels", (2, 2, 3, 9, 9), (2, 8, 3, 3, 3), padding=1),
    _conv("pixelwise", (2, 3, 10, 3, 3), (2, 7, 10, 1, 1)),
    _conv("stride_beyond_window", (1, 2, 4, 7, 7), (1, 3, 4, 1, 1), stride=3),
    _conv("window_of_all", (2, 2, 3, 4, 4), (2, 5, 3, 4, 4)),
    _conv("padding_beyond_image", (1, 1, 2, 2, 2), (1, 2, 2, 5, 5), padding=3),
    _conv("size_1", (1, 1, 1, 1, 1), (1, 1, 1, 1, 1)),
    _conv("no_tasks", (0, 2, 3, 4, 4), (0, 5, 3, 3, 3)),
    _conv("no_samples", (2, 0, 8, 4, 4), (2, 5, 8, 3, 3)),
    *(
        _conv(layout, (2, 3, 8, 5, 4), (2, 5, 8, 3, 3), padding=1, layout=layout)
        for layout in ("transposed", "gaps", "expanded", "offset", "channels_last")
    ),
]  # fmt: skip


def _norm(name: str, shape: Any, affine: str = "both", layout: str = "contiguous",
          small: bool = False, **options: Any) -> LayerCase:  # fmt: skip
    per_channel = (shape[0], shape[2])
    weight = per_channel if affine in ("both", "weight") else None
    bias = per_channel if affine in ("both", "bias") else None
    return LayerCase(name, "batch_norm", (shape, weight, bias), options, layout, small)


BATCH_NORM = [
    _norm("images", (2, 3, 4, 3, 2), small=True),
    _norm("images_relu", (2, 3, 5, 3, 2), relu=True, small=True),
    _norm("vectors", (3, 5, 7)),
    _norm("vectors_relu", (3, 6, 17), relu=True),
    _norm("many_rows", (2, 5, 3, 8, 8), relu=True),
    _norm("whole_vectors", (2, 3, 64, 3, 3), relu=True),
    _norm("ragged_channels", (1, 4, 41, 2, 2)),
    _norm("two_values", (2, 2, 3), eps=0.1),
    _norm("no_affine", (2, 3, 4, 2, 2), "none", relu=True),
    _norm("weight_only", (2, 3, 4, 2, 2), "weight", relu=True),
    _norm("bias_only", (2, 3, 4, 2, 2), "bias", relu=True),
    _norm("no_tasks", (0, 3, 4, 2, 2)),
    *(
        _norm(layout, (2, 3, 4, 3, 5), layout=layout, relu=True)
        for layout in ("transposed", "gaps", "expanded", "offset", "channels_last")
    ),
]

LAYER_NORM = [
    LayerCase("rows", "layer_norm", ((2, 3, 5), (2, 5), (2, 5)), small=True),
    LayerCase("long_rows", "layer_norm", ((2, 2, 3, 37), (2, 37), (2, 37))),
    LayerCase("no_affine", "layer_norm", ((2, 4, 16), None, None)),
    LayerCase("weight_only", "layer_norm", ((2, 4, 6), (2, 6), None), {"eps": 0.1}),
    LayerCase("vectors", "layer_norm", ((3, 8), (3, 8), (3, 8))),
    LayerCase("no_tasks", "layer_norm", ((0, 4, 6), (0, 6), (0, 6))),
    LayerCase("transposed", "layer_norm", ((2, 3, 4, 6), (2, 6), (2, 6)), layout="transposed"),
]


def _pool(
    op: str, name: str, shape: Any, kernel: Any, small: bool = False, **options: Any
) -> LayerCase:
    return LayerCase(name, op, (shape,), {"kernel_size": kernel} | options, small=small)


POOL = [
    _pool("max_pool2d", "2", (2, 2, 3, 4, 6), 2, small=True),
    _pool("max_pool2d", "overlapping", (2, 1, 5, 7, 5), 3, stride=2, padding=1),
    _pool("max_pool2d", "dilated", (1, 2, 17, 7, 6), (2, 3), stride=1, dilation=(2, 1)),
    _pool("max_pool2d", "ceil", (1, 2, 4, 5, 7), 2, ceil_mode=True),
    _pool("max_pool2d", "left_over", (2, 1, 3, 5, 5), 2),
    _pool("max_pool2d", "whole", (2, 2, 4, 3, 3), 3),
    _pool("avg_pool2d", "2", (2, 2, 3, 4, 6), 2, small=True),
    _pool("avg_pool2d", "overlapping", (2, 1, 5, 7, 5), 3, stride=2, padding=1),
    _pool("avg_pool2d", "no_pad", (1, 2, 17, 7, 6), (2, 3), padding=1, count_include_pad=False),
    _pool("avg_pool2d", "ceil", (1, 2, 4, 5, 7), 3, stride=2, padding=1, ceil_mode=True),
    _pool("avg_pool2d", "ceil_no_pad", (1, 2, 4, 5, 8), 3, stride=2, padding=1, ceil_mode=True,
          count_include_pad=False),
    _pool("avg_pool2d", "divisor", (1, 2, 4, 5, 5), 2, divisor_override=-3),
    LayerCase("layout", "max_pool2d", ((2, 3, 4, 5, 4),), {"kernel_size": 2}, "channels_last"),
    LayerCase("gaps", "avg_pool2d", ((2, 3, 4, 5, 4),), {"kernel_size": 2}, "gaps"),
    LayerCase("no_samples", "max_pool2d", ((2, 0, 3, 4, 4),), {"kernel_size": 2}),
    LayerCase("no_tasks", "avg_pool2d", ((0, 2, 3, 4, 4),), {"kernel_size": 2}),
]  # fmt: skip

LINEAR = [
    LayerCase("rows", "linear", ((2, 3, 4), (2, 5, 4), (2, 5)), small=True),
    LayerCase("sequences", "linear", ((2, 3, 2, 4), (2, 5, 4), None)),
    LayerCase("no_tasks", "linear", ((0, 3, 4), (0, 5, 4), (0, 5))),
]

LAYERS = [*CONV, *BATCH_NORM, *LAYER_NORM, *POOL, *LINEAR]
