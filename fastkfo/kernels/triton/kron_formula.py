"""Items that are too large for the Kronecker kernels: the formula, one product of PyTorch's each.

In float32 for dtypes of lower precision, as the kernels are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fastkfo.kernels.triton import launch
from fastkfo.kernels.triton.kron_item import (
    BIAS,
    COTANGENT,
    GRAD,
    LEFT,
    RIGHT,
    SCALE,
    Item,
    Operand,
)
from fastkfo.reference import kron as reference

_X = ("grads", "left", "right", "bias", "scale")


def _raw(formula: Callable[[Item], Any]) -> Callable[[Item], Any]:
    """As a kernel: no autograd, and no autocast, which would narrow the products."""

    @wraps(formula)
    def run(item: Item) -> Any:
        device = item.given["grads"].device.type
        ambient = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        off = torch.autocast(device, enabled=False) if ambient else nullcontext()
        with torch.no_grad(), off:
            return formula(item)

    return run


def _wide(operand: Operand) -> Tensor | None:
    x = operand.data
    return None if x is None else x.to(launch.accumulator(x.dtype))


def _operands(item: Item, prefix: str = "") -> reference.Operands:
    return reference.Operands(*(_wide(item.x[prefix + name]) for name in _X))


def _cotangent(item: Item) -> Tensor:
    """V of every task: what it multiplies then has T, too."""
    v = _wide(item.x["cotangents"])
    assert v is not None
    return v.expand(item.dims)


@_raw
def forward(item: Item) -> Tensor:
    """`θ + α S ∘ (A G C + β)`, `[T, B, n, m]`."""
    y = item.alpha * reference.kron_transform(_operands(item))
    param = _wide(item.x["params"])
    return (y if param is None else param + y).expand(item.dims)


@_raw
def backward(item: Item) -> dict[int, Tensor]:
    """The gradients that are wanted, each of every task."""
    v, x, wanted = item.alpha * _cotangent(item), _operands(item), item.wanted
    g, a, c = x.grad, x.left, x.right
    assert g is not None
    w = v if x.scale is None else x.scale * v
    out = {BIAS: w.sum(1)} if wanted & BIAS else {}
    if wanted & (GRAD | RIGHT):
        z = w if a is None else a.mT.unsqueeze(1) @ w
        out[GRAD] = z if c is None else z @ c.mT.unsqueeze(1)
        if wanted & RIGHT:
            out[RIGHT] = (g.mT @ z).sum(1)
    if wanted & (LEFT | SCALE):
        p = g if c is None else g @ c.unsqueeze(1)
        if wanted & LEFT:
            out[LEFT] = (w @ p.mT).sum(1)
        if wanted & SCALE:
            y = p if a is None else a.unsqueeze(1) @ p
            out[SCALE] = v * (y if x.bias is None else y + x.bias.unsqueeze(1))
    return out


@_raw
def double_backward(item: Item) -> dict[int, Tensor]:
    """The gradients that are wanted, and others, each of every task."""
    to_cotangent, x = reference.kron_double_backward(
        _cotangent(item), _operands(item), _operands(item, "d_"), item.alpha
    )
    results = dict(zip((GRAD, LEFT, RIGHT, BIAS, SCALE), x, strict=True))
    return {COTANGENT: to_cotangent} | {k: v for k, v in results.items() if v is not None}
