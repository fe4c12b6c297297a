"""Torch modules as plans: lists of plain records that JAX can follow without torch.

A layer is a dict: its "kind", the names of its parameters, its numbers. Batch norm is that of
training mode; running statistics are left out, since nothing here reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import nn

from bench.workloads import mean_of_pixels
from fastkfo.nn import Flatten, Lambda
from fastkfo.vision.models import CNN4, cnn4

Layer = dict[str, Any]
Plan = list[Layer]
Names = Mapping[int, str]

LOSSES: dict[Any, str] = {F.cross_entropy: "cross_entropy", F.mse_loss: "mse"}


def plan(module: nn.Module, names: Names) -> Plan:
    """What a module computes in training mode.

    Args:
        module: of known layers only.
        names: every parameter's name, by its `id`. Shared modules thus share their names.

    Returns:
        Its layers, in order.

    Raises:
        TypeError: It holds a module, or an option of one, that has no translation.
    """
    kind = type(module)
    if kind in _KNOWN:
        return _KNOWN[kind](module, names)
    if isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward:
        return _chain(module, names)
    raise TypeError(f"no translation to JAX of {kind.__module__}.{kind.__qualname__}")


def loss_name(loss: Callable[..., Any]) -> str:
    """A loss by its name.

    Raises:
        TypeError: It is none of LOSSES.
    """
    if loss not in LOSSES:
        raise TypeError(f"no translation to JAX of the loss {getattr(loss, '__qualname__', loss)}")
    return LOSSES[loss]


def _chain(modules: Any, names: Names) -> Plan:
    return [layer for module in modules for layer in plan(module, names)]


def _linear(module: Any, names: Names) -> Plan:
    return [{"kind": "linear", **_affine(module, names)}]


def _conv(module: Any, names: Names) -> Plan:
    plain = module.groups == 1 and module.padding_mode == "zeros"
    _only(plain and not isinstance(module.padding, str), "grouped or padded otherwise", module)
    _only(_pair(module.dilation) == (1, 1), "dilated", module)
    stride, padding = _pair(module.stride), _pair(module.padding)
    return [{"kind": "conv", "stride": stride, "padding": padding, **_affine(module, names)}]


def _batch_norm(module: Any, names: Names) -> Plan:
    by_batch = module.training or module.running_mean is None
    _only(by_batch, "by running statistics", module)
    return [{"kind": "batch_norm", "eps": module.eps, **_affine(module, names)}]


def _relu(module: Any, names: Names) -> Plan:
    return [{"kind": "relu"}]


def _max_pool(module: Any, names: Names) -> Plan:
    size, stride = _pair(module.kernel_size), _pair(module.stride)
    tiles = size == stride and _pair(module.padding) == (0, 0) and _pair(module.dilation) == (1, 1)
    _only(tiles, "with windows that are not tiles", module)
    _only(not module.ceil_mode and not module.return_indices, "with options", module)
    return [{"kind": "max_pool", "size": size}]


def _flatten(module: Any, names: Names) -> Plan:
    if isinstance(module, nn.Flatten):
        _only((module.start_dim, module.end_dim) == (1, -1), "of some dimensions", module)
    return [{"kind": "flatten"}]


def _function(module: Any, names: Names) -> Plan:
    if module.lmb in (mean_of_pixels, cnn4.spatial_mean):
        return [{"kind": "mean_of_pixels"}]
    if module.lmb is cnn4.as_omniglot:
        return [{"kind": "reshape", "shape": (-1, 1, 28, 28)}]
    name = getattr(module.lmb, "__qualname__", module.lmb)
    raise TypeError(f"no translation to JAX of Lambda({name})")


def _linear_block(module: Any, names: Names) -> Plan:
    return _chain([module.linear, module.normalize, module.relu], names)


def _conv_block(module: Any, names: Names) -> Plan:
    # Where nothing pools, max_pool is a function and does nothing.
    pool = [module.max_pool] if isinstance(module.max_pool, nn.Module) else []
    return _chain([module.conv, module.normalize, module.relu, *pool], names)


def _backbone(module: Any, names: Names) -> Plan:
    return [*_chain(module, names), {"kind": "flatten"}]


def _features_and_classifier(module: Any, names: Names) -> Plan:
    return _chain([module.features, module.classifier], names)


_KNOWN: dict[type, Callable[[Any, Names], Plan]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: _relu,
    nn.MaxPool2d: _max_pool,
    nn.Flatten: _flatten,
    Flatten: _flatten,
    Lambda: _function,
    cnn4.LinearBlock: _linear_block,
    cnn4.ConvBlock: _conv_block,
    cnn4.CNN4Backbone: _backbone,
    cnn4.OmniglotFC: _features_and_classifier,
    cnn4.OmniglotCNN: _features_and_classifier,
    CNN4: _features_and_classifier,
}


def _affine(module: Any, names: Names) -> dict[str, str | None]:
    """The names of a layer's weight and bias; None for what it lacks."""
    found = {"weight": module.weight, "bias": module.bias}
    return {role: None if p is None else names[id(p)] for role, p in found.items()}


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _only(holds: bool, otherwise: str, module: nn.Module) -> None:
    if not holds:
        raise TypeError(f"no translation to JAX of {type(module).__name__} {otherwise}")
