"""Which inner loops are one native call, and that call: `backend="fused"`.

What is known exactly is fused: chains of linear layers, elementwise functions and norms; softmax
cross-entropy and mean squares; plain, scaled and Kronecker-factored steps. Everything else keeps
its reason, in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkfo import nn as fnn
from fastkfo.functional.inner_loop import check_inputs, inner_loop_unchecked, squares, times
from fastkfo.inner_loop.buffers import TaskBuffers
from fastkfo.inner_loop.containment import finite_rows
from fastkfo.inner_loop.inputs import Batch
from fastkfo.inner_loop.loss import PerTask
from fastkfo.inner_loop.model import shell_of
from fastkfo.inner_loop.run import Outcome
from fastkfo.inner_loop.step import Rule
from fastkfo.kernels import selector
from fastkfo.optim.parameter_update import ParameterUpdate
from fastkfo.optim.recognise import (
    global_hooks,
    is_curvature_of,
    is_plain,
    kind_of,
    kronecker_part,
    own_scale,
)
from fastkfo.reference.inner_loop import LOSSES, Layer


class Unfusable(Exception):
    """An inner loop is not one native call; the message says why."""


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


class Step(NamedTuple):
    """The operands of a step, one per parameter: A, C, β, S and the numbers α."""

    left: list[Tensor | None]
    right: list[Tensor | None]
    bias: list[Tensor | None]
    scale: list[Tensor | None]
    alpha: tuple[float, ...]
    symmetric: bool


_NAMES: dict[type, str] = {
    nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
}  # fmt: skip


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
        if kind is nn.Sequential:
            for key, child in module._modules.items():
                self.read(f"{name}.{key}" if name else key, child)
            return
        self.position += 1
        if kind is nn.Linear:
            self._linear(name, module)
        elif kind in (nn.BatchNorm1d, nn.LayerNorm):
            self._norm(name, module)
        elif kind is fnn.Flatten or (
            isinstance(module, nn.Flatten)
            and kind is nn.Flatten
            and (module.start_dim, module.end_dim) == (1, -1)
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

    Raises:
        Unfusable: some layer is not known, named with its position.
    """
    if global_hooks():
        raise Unfusable("hooks are registered for all modules")
    reader = _Reader()
    reader.read("", module)
    if reader.width is None or not reader.theta:
        raise Unfusable("the model has no layer with parameters")
    return Model(tuple(reader.layers), reader.theta, reader.norms, reader.flat)


def read_step(rule: Rule, theta: Sequence[Tensor]) -> Step:
    """The operands of a learner's step.

    Raises:
        Unfusable: a transform is not known, or φ is adapted.
    """
    if rule.adapt_transform and rule.compute_update is not None:
        raise Unfusable("adapt_transform: a step of φ is not fused yet")
    update = rule.compute_update
    if update is not None and type(update) is not ParameterUpdate:
        raise Unfusable(f"compute_update is a {type(update).__name__}")
    transforms: list[Any] = [None] * len(theta) if update is None else update.transforms()
    if len(transforms) != len(theta):
        raise Unfusable("there is not one transform per parameter")
    rates = rule.lr if isinstance(rule.lr, (list, tuple, nn.ParameterList)) else None
    left: list[Tensor | None] = [None] * len(theta)
    right, bias, scale = list(left), list(left), list(left)
    alpha, psd = [], []
    for i, (transform, p) in enumerate(zip(transforms, theta, strict=True)):
        rate = rule.lr if rates is None else rates[i]
        factor = 1.0
        if transform is not None:
            kind = kind_of(transform)
            part = kronecker_part(transform, p) if kind == "reshaped" else None
            own = own_scale(transform, kind, p) if kind is not None and part is None else None
            if part is not None:
                left[i], right[i], bias[i] = part.left, part.right, part.bias
                psd.append((i, part.psd))
            elif own is not None:
                scale[i] = own.expand(p.shape)
                factor = transform.lr if kind == "curvature" else 1.0
            elif kind == "curvature" and p.dim() == 2 and is_curvature_of(transform, p):
                left[i], right[i] = transform._parameters["mc_in"], transform._parameters["mc_out"]
                factor = transform.lr
                psd.append((i, False))
            else:
                name = type(transform).__name__
                raise Unfusable(f"the transform of parameter {i}, {name}, is not known")
        if isinstance(rate, Tensor):
            if rate.numel() != 1 and rate.shape != p.shape:
                raise Unfusable(f"the learning rate of parameter {i} has a shape of its own")
            scale[i] = times(rate, scale[i], p.shape)
            alpha.append(factor)
        else:
            alpha.append(float(rate) * factor)
    for group in (left, right, bias, scale):
        for i, x in enumerate(group):
            if x is not None and (x.dtype != theta[i].dtype or x.device != theta[i].device):
                raise Unfusable(f"the transform of parameter {i} has another dtype or device")
    bias = [
        x.squeeze(-1) if x is not None and p.dim() == 1 and x.dim() == 2 else x
        for x, p in zip(bias, theta, strict=True)
    ]
    squared = [i for i, is_psd in psd if is_psd]
    if squared:
        new_left, new_right = squares([left[i] for i in squared], [right[i] for i in squared])
        for i, a, c in zip(squared, new_left, new_right, strict=True):
            left[i], right[i] = a, c
    return Step(left, right, bias, scale, tuple(alpha), len(squared) == len(psd))


def read_loss(name: str, loss: Any) -> int:
    """A loss's place in `LOSSES`.

    Raises:
        Unfusable: it is another one.
    """
    known = loss.fused_name() if isinstance(loss, PerTask) else None
    if known is None:
        raise Unfusable(f"{name} is neither F.cross_entropy nor F.mse_loss")
    return LOSSES.index(known)


class Fused:
    """An inner loop as one native call.

    Args:
        rule: how the learner adapts.
        loss: of the support.
        query_loss: of the query.

    Raises:
        Unfusable: it is not.
    """

    def __init__(self, rule: Rule, loss: Any, query_loss: Any) -> None:
        self.rule = rule
        self.losses = (read_loss("loss", loss), read_loss("query_loss", query_loss))
        self.model = read_model(rule.module)
        dtypes = {p.dtype for p in self.model.theta}
        devices = {p.device for p in self.model.theta}
        if len(dtypes) > 1 or len(devices) > 1 or not dtypes <= {torch.float32, torch.float64}:
            raise Unfusable("the parameters are not all float32 or all float64 on one device")
        self.device, self.dtype = devices.pop(), dtypes.pop()
        if selector.select("auto", self.device) != "native":
            raise Unfusable(f"there is no kernel for {self.device.type}")
        if torch.is_autocast_enabled(self.device.type):
            raise Unfusable("autocast is on")
        if torch._C._are_functorch_transforms_active():
            raise Unfusable("a transform of torch.func is active")
        self.step = read_step(rule, self.model.theta)

    def inputs(self, batch: Batch) -> Batch:
        """The batch in the form that the call takes.

        Raises:
            Unfusable: it has another one.
            ValueError: it does not fit the model.
        """
        x_s, y_s, x_q, y_q = (self._one(x) for x in batch)
        x_s, x_q = self._features(x_s), self._features(x_q)
        classes = self.model.layers[-1].out_features
        for name, x, y, loss in (("y_s", x_s, y_s, 0), ("y_q", x_q, y_q, 1)):
            if y is None:
                continue
            if y.requires_grad:
                raise Unfusable(f"{name} requires a gradient")
            if LOSSES[self.losses[loss]].startswith("cross_entropy"):
                if y.dtype != torch.int64 or y.shape != x.shape[:2]:
                    raise Unfusable(f"{name} are not labels [T, S] of int64")
                if bool((y == -100).any()):
                    raise Unfusable(f"{name} has labels that do not count (-100)")
            elif y.dtype != x.dtype or y.shape != (*x.shape[:2], classes):
                raise Unfusable(f"{name} is not of the predictions' shape and dtype")
        check_inputs(self.model.layers, x_s, y_s, x_q, y_q, self.losses)
        return Batch(x_s, y_s, x_q, y_q)

    def _one(self, x: Any) -> Any:
        if x is not None and not isinstance(x, Tensor):
            raise Unfusable("inputs and targets are not one tensor each")
        return x

    def _features(self, x: Any) -> Any:
        if x is None:
            return x
        if x.dtype != self.dtype or x.device != self.device:
            raise Unfusable(f"inputs are not {self.dtype} on {self.device}")
        if self.model.flat:
            x = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
        if x.dim() != 3 or x.shape[2] != self.model.layers[0].in_features:
            raise Unfusable(f"inputs are not [T, S, {self.model.layers[0].in_features}]")
        return x

    def run(self, batch: Batch, steps: int, buffers: str) -> tuple[Outcome, list[TaskBuffers]]:
        """The outcome, and the buffers to be committed."""
        model, step, tasks = self.model, self.step, batch.x_s.shape[0]
        groups = (model.theta, step.left, step.right, step.bias, step.scale)
        found = inner_loop_unchecked(
            model.layers, groups, *batch,
            alpha=step.alpha, steps=steps, losses=self.losses, symmetric=step.symmetric,
            first_order=self.rule.first_order, adapted=False, native=True,
        )  # fmt: skip
        seen = [x for x in (found.loss, found.support_loss) if x is not None and x.numel()]
        if found.loss is None and found.predictions is not None:
            seen.append(found.predictions)
        finite = finite_rows(seen, tasks)
        if finite is None:
            finite = found.support_loss.new_ones(tasks, dtype=torch.bool)
        outcome = Outcome(found.loss, found.predictions, found.support_loss, finite)
        return outcome, self._buffers(found.statistics, batch, tasks, buffers)

    def _buffers(
        self, statistics: Tensor, batch: Batch, tasks: int, mode: str
    ) -> list[TaskBuffers]:
        """What batch norms saw, as the passes of a batched model would have recorded it."""
        if not self.model.norms or mode != "shared":
            return []
        module = shell_of(self.rule.module)
        buffers = TaskBuffers(module, tasks, mode)
        passes = statistics.shape[1]
        for k in range(passes):
            x = batch.x_q if batch.x_q is not None and k == passes - 1 else batch.x_s
            unbiased = x.shape[1] / (x.shape[1] - 1)
            for name, at in self.model.norms:
                norm: Any = module.get_submodule(name)
                width = norm.num_features
                mean = statistics[:, k, at : at + width]
                var = statistics[:, k, at + width : at + 2 * width]
                if norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.add_(1)
                momentum = 0.0 if norm.momentum is None else norm.momentum
                buffers.record(norm.running_mean, mean, momentum)
                buffers.record(norm.running_var, var * unbiased, momentum)
            buffers.accept(unchanged=False)
        return [buffers]
