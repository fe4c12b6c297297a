"""What a fused inner loop refuses, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkfo.functional import checks
from fastkfo.functional.cross_entropy import check_range
from fastkfo.functional.inner_loop_spec import GROUPS
from fastkfo.reference.inner_loop import ELEMENTWISE, KINDS, LOSSES, Layer


def check_layers(layers: Sequence[Layer], count: int) -> None:
    """Raise unless layers follow each other and have every parameter once."""
    if not layers:
        raise ValueError("layers: expected at least one layer, got none")
    seen: list[int] = []
    width = layers[0].in_features
    for i, layer in enumerate(layers):
        if layer.kind not in KINDS:
            raise ValueError(f"layers: expected one of {KINDS} at position {i}, got {layer.kind!r}")
        if layer.in_features != width:
            raise ValueError(
                f"layers: expected {width} features to come into position {i}, "
                f"got {layer.in_features}"
            )
        if layer.kind != "linear" and layer.out_features != width:
            raise ValueError(
                f"layers: expected {width} features to come out of position {i} ({layer.kind}), "
                f"got {layer.out_features}"
            )
        if layer.kind == "linear" and layer.weight < 0:
            raise ValueError(f"layers: expected a weight for the linear layer at position {i}")
        if layer.kind in ELEMENTWISE and max(layer.weight, layer.bias) >= 0:
            raise ValueError(f"layers: expected no parameters of {layer.kind} at position {i}")
        seen += [k for k in (layer.weight, layer.bias) if k >= 0]
        width = layer.out_features
    if sorted(seen) != list(range(count)):
        raise ValueError(
            f"layers: expected each of {count} parameters in exactly one place, got {sorted(seen)}"
        )


def check_inputs(
    layers: Sequence[Layer],
    x_s: Tensor,
    y_s: Tensor,
    x_q: Tensor | None,
    y_q: Tensor | None,
    losses: tuple[int, int],
) -> None:
    """Raise unless inputs and targets fit the model, the losses and each other."""
    if y_q is not None and x_q is None:
        raise ValueError("y_q: expected None without x_q, got targets")
    tasks = x_s.shape[0] if x_s.dim() else 0
    for name, x in (("x_s", x_s), ("x_q", x_q)):
        if x is None:
            continue
        same_kind(name, x, x_s)
        if x.dim() != 3 or 0 in x.shape[1:] or x.shape[0] != tasks:
            raise ValueError(
                f"{name}: expected [T, S, m] with {tasks} tasks and at least one sample, "
                f"got shape {list(x.shape)}"
            )
        if x.shape[2] != layers[0].in_features:
            raise ValueError(
                f"{name}: expected {layers[0].in_features} features per sample, got {x.shape[2]}"
            )
        if x.shape[1] < 2 and any([layer.kind == "batch_norm" for layer in layers]):
            raise ValueError(
                f"{name}: expected more than one sample per task for batch norm, got {x.shape[1]}"
            )
    check_targets("y_s", y_s, x_s, layers[-1].out_features, losses[0])
    if x_q is not None and y_q is not None:
        check_targets("y_q", y_q, x_q, layers[-1].out_features, losses[1])


def check_targets(name: str, y: Tensor, x: Tensor, classes: int, loss: int) -> None:
    """Raise unless targets fit predictions."""
    given: object = y
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
    if y.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, got {y.device}")
    if LOSSES[loss].startswith("cross_entropy"):
        if y.dtype != torch.int64:
            raise TypeError(f"{name}: expected labels of int64 for cross-entropy, got {y.dtype}")
        if y.shape != x.shape[:2]:
            raise ValueError(f"{name}: expected shape {list(x.shape[:2])}, got {list(y.shape)}")
        check_range(name, y, classes)
        return
    if y.dtype != x.dtype:
        raise TypeError(f"{name}: expected {x.dtype}, got {y.dtype}")
    if y.shape != (*x.shape[:2], classes):
        raise ValueError(
            f"{name}: expected shape {[*x.shape[:2], classes]} as the predictions', "
            f"got {list(y.shape)}"
        )


def same_kind(name: str, x: object, like: Tensor) -> None:
    """Raise unless x is a tensor of that dtype on that device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype} as x_s, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as x_s, got {x.device}")


def choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {tuple(choices)}, got {value!r}")


def loss_index(prefix: str, loss: str, reduction: str) -> int:
    """A loss's place in `LOSSES`."""
    choice(f"{prefix}loss", loss, ("cross_entropy", "mse"))
    choice(f"{prefix}reduction", reduction, ("mean", "sum"))
    return LOSSES.index(f"{loss}_{reduction}")


def shapes_of(layers: Sequence[Layer], count: int) -> list[tuple[int, ...]]:
    """Every parameter's shape."""
    shapes: list[tuple[int, ...]] = [()] * count
    for layer in layers:
        if layer.weight >= 0:
            matrix = layer.kind == "linear"
            n, m = layer.out_features, layer.in_features
            shapes[layer.weight] = (n, m) if matrix else (n,)
        if layer.bias >= 0:
            shapes[layer.bias] = (layer.out_features,)
    return shapes


def check_operands(
    layers: Sequence[Layer], groups: list[list[Any]], x_s: Tensor, psd: bool
) -> None:
    """Raise unless θ, L, R, β, S fit the model, for all tasks or each its own."""
    tasks = x_s.shape[0]
    for i, shape in enumerate(shapes_of(layers, len(groups[0]))):
        n, m = shape if len(shape) == 2 else (shape[0], 1)
        for name, group in zip(GROUPS, groups, strict=True):
            x = group[i]
            if x is None:
                if name == "theta":
                    raise TypeError(f"theta: expected a tensor for parameter {i}, got NoneType")
                continue
            same_kind(f"{name} of parameter {i}", x, x_s)
            side = {"left": n, "right": m}.get(name)
            if name == "bias" and len(shape) == 1 and x.shape[-2:] == (n, 1):
                x = group[i] = x.squeeze(-1)
            wanted = (x.shape[-2] if psd and x.dim() > 1 else side, side) if side else shape
            own = (tasks, *wanted)
            if x.shape not in (wanted, own):
                raise ValueError(
                    f"{name} of parameter {i}: expected shape {list(wanted)} or {list(own)}, "
                    f"got {list(x.shape)}"
                )


def check_adaptable(groups: Sequence[Sequence[Tensor | None]]) -> None:
    """Raise unless L, R and β can take steps."""
    _, left, right, _, scale = groups
    for name, group in (("left", left), ("right", right)):
        for i, x in enumerate(group):
            if x is not None and x.shape[-2] != x.shape[-1]:
                raise ValueError(
                    f"{name} of parameter {i}: expected a square factor with adapt_transform, "
                    f"got {list(x.shape)}"
                )
    for i, x in enumerate(scale):
        if x is not None:
            raise ValueError(
                f"scale of parameter {i}: expected None, and no lr that is a tensor, with "
                f"adapt_transform, got shape {list(x.shape)}"
            )


def rates_of(lr: Any, groups: list[list[Any]], layers: Sequence[Layer]) -> tuple[float, ...]:
    """One number per parameter; rates that are tensors become part of the scale."""
    count = len(groups[0])
    if isinstance(lr, (list, tuple)) and len(lr) != count:
        raise ValueError(f"lr: expected one rate per parameter, {count}, got {len(lr)}")
    rates = list(lr) if isinstance(lr, (list, tuple)) else [lr] * count
    shapes = shapes_of(layers, count)
    alpha = []
    for i, rate in enumerate(rates):
        if not isinstance(rate, Tensor):
            checks.finite("lr", rate)
            alpha.append(float(rate))
            continue
        if rate.numel() != 1 and rate.shape != shapes[i]:
            raise ValueError(
                f"lr of parameter {i}: expected a scalar or shape {list(shapes[i])}, "
                f"got {list(rate.shape)}"
            )
        theta = groups[0][i]
        if isinstance(theta, Tensor) and rate.device != theta.device:
            raise ValueError(
                f"lr of parameter {i}: expected device {theta.device}, got {rate.device}"
            )
        groups[4][i] = times(rate, groups[4][i], shapes[i])
        alpha.append(1.0)
    return tuple(alpha)


def times(rate: Tensor, scale: Tensor | None, shape: Sequence[int]) -> Tensor:
    """A rate that is a tensor, as a scale or part of one."""
    whole = rate.reshape(()).expand(shape) if rate.numel() == 1 else rate
    return whole if scale is None else whole * scale
