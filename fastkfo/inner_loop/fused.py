"""Which inner loops are one native call, and that call: `backend="fused"`.

What is known exactly is fused: chains of linear layers, elementwise functions and norms; softmax
cross-entropy and mean squares; plain, scaled and Kronecker-factored steps. Everything else keeps
its reason, in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkfo import nn as fnn
from fastkfo.functional.cross_entropy import check_range
from fastkfo.functional.gram import gram_unchecked
from fastkfo.functional.inner_loop import InnerLoopResult, Spec, flattened, run, times
from fastkfo.inner_loop.buffers import TaskBuffers
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
    """The operands of a step, one per parameter: L, R, β, S and the numbers α.

    Attributes:
        psd: whether the call squares the factors.
        derived: whether some operand was computed from what is learned, and belongs to one graph.
    """

    left: list[Tensor | None]
    right: list[Tensor | None]
    bias: list[Tensor | None]
    scale: list[Tensor | None]
    alpha: tuple[float, ...]
    psd: bool
    derived: bool


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
    alpha, squared, plain, derived = [], [], [], False
    for i, (transform, p) in enumerate(zip(transforms, theta, strict=True)):
        rate = rule.lr if rates is None else rates[i]
        factor = 1.0
        if transform is not None:
            kind = kind_of(transform)
            part = kronecker_part(transform, p) if kind == "reshaped" else None
            own = own_scale(transform, kind, p) if kind is not None and part is None else None
            if part is not None:
                left[i], right[i], bias[i] = part.left, part.right, part.bias
                (squared if part.psd else plain).append(i)
            elif own is not None:
                scale[i] = own if own.shape == p.shape else own.expand(p.shape)
                derived = derived or own.shape != p.shape
                factor = transform.lr if kind == "curvature" else 1.0
            elif kind == "curvature" and p.dim() == 2 and is_curvature_of(transform, p):
                left[i], right[i] = transform._parameters["mc_in"], transform._parameters["mc_out"]
                factor = transform.lr
                plain.append(i)
            else:
                name = type(transform).__name__
                raise Unfusable(f"the transform of parameter {i}, {name}, is not known")
        if isinstance(rate, Tensor):
            if rate.numel() != 1 and rate.shape != p.shape:
                raise Unfusable(f"the learning rate of parameter {i} has a shape of its own")
            derived = derived or scale[i] is not None or rate.shape != p.shape
            scale[i] = times(rate, scale[i], p.shape)
            alpha.append(factor)
        else:
            alpha.append(float(rate) * factor)
    for group in (left, right, bias, scale):
        for i, x in enumerate(group):
            if x is not None and (x.dtype != theta[i].dtype or x.device != theta[i].device):
                raise Unfusable(f"the transform of parameter {i} has another dtype or device")
    if squared and plain:  # the call squares all factors or none
        factors: list[Any] = [x[i] for x in (left, right) for i in squared]
        squares = gram_unchecked(factors)
        for i, a, c in zip(squared, squares, squares[len(squared) :], strict=False):
            left[i], right[i] = a, c
        derived = True
    return Step(left, right, bias, scale, tuple(alpha), bool(squared) and not plain, derived)


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
        self.labels = [LOSSES[k].startswith("cross_entropy") for k in self.losses]
        self.model = read_model(rule.module)
        dtypes = {p.dtype for p in self.model.theta}
        devices = {p.device for p in self.model.theta}
        if len(dtypes) > 1 or len(devices) > 1 or not dtypes <= {torch.float32, torch.float64}:
            raise Unfusable("the parameters are not all float32 or all float64 on one device")
        self.device, self.dtype = devices.pop(), dtypes.pop()
        if selector.select("auto", self.device) != "native":
            raise Unfusable(f"there is no kernel for {self.device.type}")
        self.features = self.model.layers[0].in_features
        self.classes = self.model.layers[-1].out_features
        self.least = 2 if any([x.kind == "batch_norm" for x in self.model.layers]) else 1
        self._read_step()

    def _read_step(self) -> None:
        model, step = self.model, read_step(self.rule, self.model.theta)
        groups = (model.theta, step.left, step.right, step.bias, step.scale)
        self.present, self.flat = flattened(groups)
        self.step = step
        self._specs: dict[tuple[int, bool], Spec] = {}

    def inputs(self, batch: Batch) -> Batch:
        """The batch in the form that the call takes.

        Raises:
            Unfusable: it has another one.
        """
        x_s, y_s, x_q, y_q = batch
        x_s = self._features("x_s", x_s)
        x_q = None if x_q is None else self._features("x_q", x_q)
        self._check_targets("y_s", y_s, x_s, self.labels[0])
        if y_q is not None:
            self._check_targets("y_q", y_q, x_q, self.labels[1])
        return Batch(x_s, y_s, x_q, y_q)

    def _features(self, name: str, x: Any) -> Tensor:
        if not isinstance(x, Tensor):
            raise Unfusable(f"{name} is not one tensor")
        if x.dtype != self.dtype or x.device != self.device:
            raise Unfusable(f"{name} is not {self.dtype} on {self.device}")
        if self.model.flat:
            x = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
        if x.dim() != 3 or x.shape[2] != self.features or x.shape[1] < self.least:
            raise Unfusable(
                f"{name} is not [T, S, {self.features}] with at least {self.least} samples"
            )
        return x

    def _check_targets(self, name: str, y: Any, x: Tensor, labels: bool) -> None:
        if not isinstance(y, Tensor):
            raise Unfusable(f"{name} is not one tensor")
        if labels:
            fits = y.dtype == torch.int64 and y.shape == x.shape[:2]
        else:
            fits = y.dtype == x.dtype and y.shape == (*x.shape[:2], self.classes)
        if not fits or y.device != x.device:
            what = "labels [T, S] of int64" if labels else "of the predictions' shape and dtype"
            raise Unfusable(f"{name} is not {what}")
        if y.requires_grad:
            raise Unfusable(f"{name} requires a gradient")

    def run(self, batch: Batch, steps: int, adapted: bool = False) -> InnerLoopResult:
        """The call.

        Raises:
            Unfusable: some labels do not count.
            ValueError: some labels are out of range.
        """
        if torch.is_autocast_enabled(self.device.type):
            raise Unfusable("autocast is on")
        if torch._C._are_functorch_transforms_active():
            raise Unfusable("a transform of torch.func is active")
        if self.step.derived:
            self._read_step()
        spec = self._specs.get((steps, adapted))
        if spec is None:
            spec = self._specs[steps, adapted] = Spec(
                self.model.layers, self.present, self.step.alpha, steps, self.losses,
                self.step.psd, self.rule.first_order, adapted, native=True,
            )  # fmt: skip
        try:
            return run(spec, self.flat, *batch)
        except RuntimeError as error:
            if "expected labels" not in str(error):
                raise
            refused = error
        for name, y, labels in (("y_s", batch.y_s, 0), ("y_q", batch.y_q, 1)):
            if y is not None and self.labels[labels]:
                if bool((y == -100).any()):
                    raise Unfusable(f"{name} has labels that do not count (-100)")
                check_range(name, y, self.classes)
        raise refused

    def outcome(
        self, batch: Batch, steps: int, buffers: str
    ) -> tuple[Outcome, list[TaskBuffers]]:
        """What comes of it, and the buffers to be committed."""
        found = self.run(batch, steps)
        outcome = Outcome(found.loss, found.predictions, found.support_loss, found.finite)
        if not self.model.norms or buffers != "shared":
            return outcome, []
        return outcome, [self._buffers(found.statistics, batch)]

    def _buffers(self, statistics: Tensor, batch: Batch) -> TaskBuffers:
        """What batch norms saw, as the passes of a batched model would have recorded it."""
        module = shell_of(self.rule.module)
        buffers = TaskBuffers(module, batch.x_s.shape[0], "shared")
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
        return buffers


class Remembered:
    """A `Fused` of a learner, for as long as nothing changes that it depends on.

    Reading a learner takes longer than all steps of a small one. So what it was read from is
    compared, object by object: every attribute of every module, what its dictionaries and lists
    hold, and of every parameter what assigning to `.data` can change.
    """

    def __init__(self) -> None:
        self._fused: Fused | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without what it remembers."""
        return Remembered, ()

    def get(self, learner: nn.Module, loss: Any, query_loss: Any) -> Fused | None:
        """What is remembered, if it is still right."""
        fused = self._fused
        if fused is None or self._learner is not learner or not self._unchanged():
            return None
        if (read_loss("loss", loss), read_loss("query_loss", query_loss)) != fused.losses:
            return None
        return fused

    def keep(self, learner: nn.Module, fused: Fused) -> None:
        """Remember."""
        modules = list(learner.modules())
        self._fused, self._learner = fused, learner
        self._classes = [(m, type(m)) for m in modules]
        self._states = [(m.__dict__, list(m.__dict__.values())) for m in modules]
        values = [v for _, state in self._states for v in state]
        self._empty = [v for v in values if isinstance(v, (dict, list, set)) and not v]
        self._full = [(v.values(), list(v.values())) for v in values if isinstance(v, dict) and v]
        self._full += [(v, list(v)) for v in values if isinstance(v, list) and v]
        params = {p: None for m in modules for p in m._parameters.values() if p is not None}
        self._params = [(p, p.dtype, p.device, p.shape, p.requires_grad) for p in params]

    def _unchanged(self) -> bool:
        if any(self._empty) or global_hooks():
            return False
        for module, kind in self._classes:
            if type(module) is not kind:
                return False
        for state, values in self._states:
            if len(state) != len(values) or not all(map(is_, state.values(), values)):
                return False
        for now, before in self._full:
            if len(now) != len(before) or not all(map(is_, now, before)):
                return False
        for p, dtype, device, shape, wants in self._params:
            if p.dtype is not dtype or p.requires_grad is not wants:
                return False
            if p.shape != shape or p.device != device:
                return False
        return True
