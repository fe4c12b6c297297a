"""Reads models that a fused inner loop knows: chains of linear layers, activations and norms."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from fastkfo import nn as fnn
from fastkfo.optim.recognise import global_hooks, is_plain
from fastkfo.reference.inner_loop import Layer
from fastkfo.utils import ParameterSlots


class Unfusable(Exception):
    """An inner loop is not one native call; the message says why."""

    def as_error(self) -> ValueError:
        """For those who asked for it by name."""
        return ValueError(f"backend: expected an inner loop that can be fused, for 'fused'. {self}")


class Model(NamedTuple):
    """A chain of known layers.

    Attributes:
        layers: from the inputs to the outputs.
        theta: its parameters, in the order of `module.parameters()`.
        norms: its batch norms that keep running statistics, with the place of theirs in a pass's.
        flat: whether inputs are flattened first.
    """

    layers: tuple[Layer, ...]
    theta: list[Tensor]
    norms: list[tuple[str, int]]
    flat: bool


_NAMES: dict[type, str] = {
    nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
}  # fmt: skip


# Modules of this package and of learn2learn by what their forward calls, in order.
_COMPOSITES: dict[str, tuple[str, ...]] = {
    "vision.models.cnn4.LinearBlock": ("linear", "normalize", "relu"),
    "vision.models.cnn4.OmniglotFC": ("features", "classifier"),
}


def _known_name(kind: type) -> str | None:
    package, _, rest = f"{kind.__module__}.{kind.__qualname__}".partition(".")
    return rest if package in ("fastkfo", "learn2learn") else None


class _Reader:
    """Reads a module layer by layer."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.theta: list[Tensor] = []
        self.norms: list[tuple[str, int]] = []
        self.flat = False
        self.width: int | None = None
        self.position = 0
        self.statistics = 0

    def read(self, name: str, module: nn.Module | None) -> None:
        if module is None:
            return
        kind = type(module)
        if not is_plain(module):
            raise Unfusable(f"{self._place(name, module)} has hooks or a forward of its own")
        if kind in (nn.Sequential, fnn.LinNet):
            for key, child in module._modules.items():
                self.read(f"{name}.{key}" if name else key, child)
            return
        parts = _COMPOSITES.get(_known_name(kind) or "")
        if parts is not None:
            for key in parts:
                self.read(f"{name}.{key}" if name else key, module._modules[key])
            return
        self.position += 1
        if kind is nn.Linear:
            self._linear(name, module)
        elif kind in (nn.BatchNorm1d, nn.LayerNorm):
            self._norm(name, module)
        elif (
            kind is fnn.Flatten
            or _known_name(kind) == "nn.misc.Flatten"
            or (
                isinstance(module, nn.Flatten)
                and kind is nn.Flatten
                and (module.start_dim, module.end_dim) == (1, -1)
            )
        ):
            self.flat = self.flat or not self.layers
        elif isinstance(module, (nn.Identity, nn.Dropout)) and kind in (nn.Identity, nn.Dropout):
            if isinstance(module, nn.Dropout) and module.training and module.p > 0:
                raise Unfusable(f"{self._place(name, module)} draws random numbers")
        elif kind in _NAMES:
            self._elementwise(_NAMES[kind], getattr(module, "negative_slope", 0.0))
        elif isinstance(module, nn.GELU) and kind is nn.GELU:
            self._elementwise("gelu" if module.approximate == "none" else "gelu_tanh", 0.0)
        else:
            raise Unfusable(f"{self._place(name, module)} is not a layer that is known")

    def _place(self, name: str, module: nn.Module) -> str:
        return f"{type(module).__name__} ({name!r}, layer {self.position})"

    def _elementwise(self, kind: str, constant: float) -> None:
        width = self.width if self.width is not None else 0
        self.layers.append(Layer(kind, width, width, constant=float(constant)))

    def _parameter(self, name: str, module: nn.Module, key: str) -> int:
        p = module._parameters.get(key)
        if p is None:
            if getattr(module, key, None) is not None:
                raise Unfusable(f"{key!r} of {self._place(name, module)} is no parameter")
            return -1
        if not p.requires_grad:
            raise Unfusable(f"{key!r} of {self._place(name, module)} requires no gradient")
        if any([p is q for q in self.theta]):
            raise Unfusable(f"{key!r} of {self._place(name, module)} is shared by two layers")
        self.theta.append(p)
        return len(self.theta) - 1

    def _linear(self, name: str, module: nn.Module) -> None:
        weight = self._parameter(name, module, "weight")
        if weight < 0:
            raise Unfusable(f"{self._place(name, module)} has no weight")
        n, m = self.theta[weight].shape
        self._fits(name, module, m)
        bias = self._parameter(name, module, "bias")
        self.layers.append(Layer("linear", m, n, weight, bias))
        self.width = n

    def _norm(self, name: str, module: Any) -> None:
        batch = type(module) is nn.BatchNorm1d
        if batch and not module.training and module.running_mean is not None:
            raise Unfusable(f"{self._place(name, module)} uses its running statistics")
        if not batch and len(module.normalized_shape) != 1:
            raise Unfusable(f"{self._place(name, module)} is over more than one axis")
        width = module.num_features if batch else module.normalized_shape[0]
        self._fits(name, module, width)
        weight = self._parameter(name, module, "weight")
        bias = self._parameter(name, module, "bias")
        kind = "batch_norm" if batch else "layer_norm"
        self.layers.append(Layer(kind, width, width, weight, bias, float(module.eps)))
        self.width = width
        if batch:
            if module.running_mean is not None:
                self.norms.append((name, self.statistics))
            self.statistics += 2 * width

    def _fits(self, name: str, module: nn.Module, width: int) -> None:
        if self.width is None:  # elementwise functions before it have its width
            self.layers = [
                layer._replace(in_features=width, out_features=width) for layer in self.layers
            ]
        elif self.width != width:
            raise Unfusable(
                f"{self._place(name, module)} takes {width} features, but {self.width} come in"
            )
        self.width = width


def read_model(module: nn.Module) -> Model:
    """A module as a chain of layers.

    Args:
        module: the model.

    Returns:
        The chain.

    Raises:
        Unfusable: some layer is not known, named with its position.
    """
    if global_hooks():
        raise Unfusable("hooks are registered for all modules")
    reader = _Reader()
    reader.read("", module)
    if reader.width is None or not reader.theta:
        raise Unfusable("the model has no layer with parameters")
    # Layers come in the order of the forward pass, parameters in that of the module.
    theta = ParameterSlots(module).params
    if len(theta) != len(reader.theta):
        raise Unfusable("the model has parameters that its layers do not use")
    place = {id(p): i for i, p in enumerate(theta)}
    index = [place[id(p)] for p in reader.theta] + [-1]
    layers = [
        layer._replace(weight=index[layer.weight], bias=index[layer.bias])
        for layer in reader.layers
    ]
    return Model(tuple(layers), theta, reader.norms, reader.flat)
