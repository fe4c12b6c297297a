"""K inner steps of T tasks, and their exact meta-gradient, in one native call each.

For models that are chains of known layers: linear heads and MLPs, with or without norms. Source:
Finn, Abbeel, Levine 2017; Arnold, Iqbal, Sha 2021; docs/inner_loop.md has the derivation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastkfo.functional import checks
from fastkfo.functional.cross_entropy import check_range
from fastkfo.kernels import selector, tapes
from fastkfo.reference import inner_loop as reference
from fastkfo.reference.inner_loop import ELEMENTWISE, KINDS, LOSSES, Layer

Operands = Sequence["Tensor | None"]
_GROUPS = ("theta", "left", "right", "bias", "scale")  # in the order of their bits


class InnerLoopResult(NamedTuple):
    """What `inner_loop` returns.

    Attributes:
        loss: query losses `[T]`; None without `y_q`.
        predictions: of the query, `[T, Q, C]`, detached; None without `x_q`.
        support_loss: `[T, K]`, the losses that were adapted to, detached.
        theta: θ_K, `[T, ...]` per parameter; empty unless asked for.
        statistics: mean and biased variance of every batch norm in every pass, detached:
            `[T, K + 1, F]` (K without `x_q`), F being twice the features of all of them.
        finite: `[T]`, whether a task's losses are (its predictions, without a query loss).
    """

    loss: Tensor | None
    predictions: Tensor | None
    support_loss: Tensor
    theta: list[Tensor]
    statistics: Tensor
    finite: Tensor


class Spec:
    """Everything about a call that is no tensor.

    Args:
        layers: the model.
        present: which operands there are, one bit mask per parameter.
        alpha: one learning rate per parameter.
        steps: K.
        losses: the support's and the query's, indices into `LOSSES`.
        psd: whether factors are squared.
        first_order: whether gradients are constants.
        adapted: whether θ_K is returned.
        native: whether the kernels run.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        present: Sequence[int],
        alpha: Sequence[float],
        steps: int,
        losses: tuple[int, int],
        psd: bool,
        first_order: bool,
        adapted: bool,
        native: bool,
    ) -> None:
        self.layers, self.present, self.alpha = layers, present, alpha
        self.steps, self.losses, self.psd = steps, losses, psd
        self.first_order, self.adapted, self.native = first_order, adapted, native
        numbers: list[int] = []
        for layer in layers:
            numbers += (KINDS.index(layer.kind), *layer[1:5])
        constants = [layer.constant for layer in layers]
        self.arguments = (numbers, constants, list(alpha), steps, *losses, psd)
        self._tape_sizes: dict[Any, int] = {}
        # For each kind of operand and parameter, its place among those that follow each other.
        place = iter(range(sum([mask.bit_count() for mask in present])))
        self.places = [
            [next(place) if mask & (1 << bit) else None for mask in present]
            for bit in range(len(_GROUPS))
        ]

    def groups(self, flat: Sequence[Any]) -> list[list[Any]]:
        """Operands that follow each other, as one list per kind with None for what is absent."""
        return [[None if k is None else flat[k] for k in places] for places in self.places]

    def tape_size(self, data: Sequence[Any]) -> int:
        """How many numbers per task the derivative needs."""
        x_s, _, x_q, y_q = data[-4:]
        key = (x_s.dtype, x_s.shape[1], x_q is None or x_q.shape[1], y_q is None)
        size = self._tape_sizes.get(key)
        if size is None:
            size = torch.ops.fastkfo.inner_loop_tape.default(*data, *self.arguments)
            self._tape_sizes[key] = size
        return size

    def masks(self, wants: Sequence[bool]) -> list[int]:
        """What is wanted of every parameter, as bits."""
        return [
            sum([1 << bit for bit, k in enumerate(own) if k is not None and wants[k]])
            for own in zip(*self.places, strict=True)
        ]


def inner_loop(
    layers: Sequence[Layer],
    theta: Sequence[Tensor],
    x_s: Tensor,
    y_s: Tensor,
    x_q: Tensor | None = None,
    y_q: Tensor | None = None,
    *,
    steps: int,
    lr: float | Tensor | Sequence[float | Tensor],
    left: Operands | None = None,
    right: Operands | None = None,
    bias: Operands | None = None,
    scale: Operands | None = None,
    psd: bool = False,
    loss: str = "cross_entropy",
    reduction: str = "mean",
    query_loss: str | None = None,
    query_reduction: str | None = None,
    first_order: bool = False,
    adapted: bool = False,
    implementation: str = "auto",
) -> InnerLoopResult:
    """Adapt T tasks at once, and ask for their query losses.

    For k = 0 … K − 1, `θ_{k+1} = θ_k − lr · S ∘ (A g_k C + β)` with `g_k = ∇ℓ_s(θ_k)` per task;
    then ℓ_q(θ_K). A is `left`, or `leftᵀ left` with `psd`; C is `right`, or `rightᵀ right`; an
    operand that is None is absent. A vector's gradient counts as n × 1.

    Differentiable in every floating-point tensor but the targets. The derivative is a kernel; its
    own derivatives (a third order of the model) are those of the reference, which is run for them.
    A task whose numbers are not finite, or whose cotangent is zero, contributes exactly nothing to
    gradients of what tasks share.

    Args:
        layers: the model, from its inputs to its outputs: see `Layer`. Kinds are "linear", "relu",
            "leaky_relu", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "batch_norm" (on batch
            statistics) and "layer_norm".
        theta: θ_0, one tensor per parameter, `[n, m]` for a linear layer's weight and `[n]`
            otherwise, or with a leading T.
        x_s: support inputs `[T, S, m]`, float32 or float64 as all operands.
        y_s: support targets, labels `[T, S]` of int64 for cross-entropy, `[T, S, C]` for "mse".
        x_q: query inputs `[T, Q, m]`, or None.
        y_q: query targets likewise, or None.
        steps: K, at least 0.
        lr: the learning rate; or one per parameter, a number, or a tensor of its shape or a scalar.
        left: L, `[T?, n, n]` (`[T?, r, n]` with `psd`), per parameter or None.
        right: R, `[T?, m, m]` (`[T?, r, m]`), likewise.
        bias: β, of the parameter's shape, or `[n, 1]`, likewise.
        scale: S, of the parameter's shape, likewise.
        psd: whether factors are squared.
        loss: of the support, "cross_entropy" or "mse".
        reduction: over a task's samples, "mean" or "sum".
        query_loss: of the query; None: the same.
        query_reduction: of the query; None: the same.
        first_order: whether the g_k count as constants.
        adapted: whether θ_K is returned.
        implementation: "auto", "native" or "reference".

    Returns:
        See `InnerLoopResult`.

    Raises:
        TypeError: an operand is no tensor or of another dtype.
        ValueError: shapes, devices or options do not fit, or (on the CPU) a label is out of range.
        ImplementationUnavailable: the implementation named is not available.
    """
    layers = tuple(layers)
    check_layers(layers, len(theta))
    checks.floating_tensor("x_s", x_s)
    _check_choice("reduction", reduction, ("mean", "sum"))
    kinds = (
        _loss_index("loss", loss, reduction),
        _loss_index("query_loss", query_loss or loss, query_reduction or reduction),
    )
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
    if steps < 0:
        raise ValueError(f"steps: expected at least 0, got {steps}")
    check_inputs(layers, x_s, y_s, x_q, y_q, kinds)
    count = len(theta)
    groups: list[list[Any]] = [list(theta)]
    for name, group in (("left", left), ("right", right), ("bias", bias), ("scale", scale)):
        if group is not None and len(group) != count:
            raise ValueError(f"{name}: expected {count} entries as in theta, got {len(group)}")
        groups.append([None] * count if group is None else list(group))
    alpha = _rates(lr, groups, layers)
    _check_operands(layers, groups, x_s, psd)
    chosen = selector.select(implementation, x_s.device)
    if x_s.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x_s: expected float32 or float64, got {x_s.dtype}")
    return inner_loop_unchecked(
        layers, groups, x_s, y_s, x_q, y_q,
        alpha=alpha, steps=steps, losses=kinds, psd=psd, first_order=first_order,
        adapted=adapted, native=chosen == "native",
    )  # fmt: skip


def inner_loop_unchecked(
    layers: Sequence[Layer],
    groups: Sequence[Sequence[Tensor | None]],
    x_s: Tensor,
    y_s: Tensor,
    x_q: Tensor | None,
    y_q: Tensor | None,
    **options: Any,
) -> InnerLoopResult:
    """`inner_loop` for operands known to be right: θ, L, R, β, S, one list each."""
    present, flat = flattened(groups)
    return run(Spec(layers, present, **options), flat, x_s, y_s, x_q, y_q)


def flattened(groups: Sequence[Sequence[Tensor | None]]) -> tuple[list[int], list[Tensor]]:
    """Which operands there are, as bits of every parameter; and these, one after the other."""
    present = [0] * len(groups[0])
    flat = []
    for bit, group in enumerate(groups):
        for i, x in enumerate(group):
            if x is not None:
                present[i] |= 1 << bit
                flat.append(x)
    return present, flat


def run(
    spec: Spec,
    flat: Sequence[Tensor],
    x_s: Tensor,
    y_s: Tensor,
    x_q: Tensor | None,
    y_q: Tensor | None,
) -> InnerLoopResult:
    """The call that a `Spec` says."""
    if torch._C._are_functorch_transforms_active():
        return _by_reference(spec, x_s, y_s, x_q, y_q, flat, graph=True)
    loss, support, predictions, statistics, finite, *theta = InnerLoop.apply(
        spec, x_s, y_s, x_q, y_q, *flat
    )
    return InnerLoopResult(
        None if y_q is None or x_q is None else loss,
        None if x_q is None else predictions,
        support,
        theta,
        statistics,
        finite,
    )


class InnerLoop(Function):
    """Query losses, support losses, predictions, statistics, finite, and θ_K if it is asked for.

    Where only query losses can have a cotangent, the gradient is computed along with them, for a
    cotangent of 1: what a task needs for it is in the cache then, and no tape is written. Gradients
    are linear in the cotangents, so that those of tasks that all have the same one (a mean, a sum)
    are that multiple. Other cotangents take a second run, with a tape.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: Spec,
        x_s: Tensor,
        y_s: Tensor,
        x_q: Tensor | None,
        y_q: Tensor | None,
        *flat: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        wants = ctx.needs_input_grad
        ctx.spec, ctx.tape, ctx.ready = spec, None, None
        data = (*spec.groups(flat), x_s, y_s, x_q, y_q)
        differentiable = any(wants)
        if not spec.native:
            results = _outputs(_by_reference(spec, x_s, y_s, x_q, y_q, flat), x_s)
        elif differentiable and y_q is not None and not spec.adapted:
            results = torch.ops.fastkfo.inner_loop_gradient.default(
                *data, *spec.arguments, spec.first_order, spec.masks(wants[5:]), wants[1], wants[3]
            )
            ctx.ready, results = results[5:], results[:5]
        else:
            if differentiable:
                ctx.tape = tapes.Tape(len(x_s), spec.tape_size(data), x_s)
            results = _run_native(spec, data, ctx.tape)
        if differentiable:
            ctx.save_for_backward(x_s, y_s, x_q, y_q, *flat)
        ctx.mark_non_differentiable(*results[1:5])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        spec: Spec = ctx.spec
        x_s, y_s, x_q, y_q, *flat = ctx.saved_tensors
        wants = ctx.needs_input_grad
        d_loss, d_theta = cotangents[0], cotangents[5:]
        if d_loss is None and not any([c is not None for c in d_theta]):
            return (None,) * len(wants)
        if not spec.native or torch.is_grad_enabled():
            return _pulled_by_reference(spec, d_loss, d_theta, x_s, y_s, x_q, y_q, flat, wants)
        masks = spec.masks(wants[5:])
        found = None if ctx.ready is None else _multiple(ctx.ready, d_loss)
        if found is None:
            data = (*spec.groups(flat), x_s, y_s, x_q, y_q)
            tape = ctx.tape
            if tape is None:
                tape = tapes.Tape(len(x_s), spec.tape_size(data), x_s)
                _run_native(spec, data, tape)
            found = torch.ops.fastkfo.inner_loop_backward.default(
                d_loss, list(d_theta), *data, tape.tensor, *spec.arguments, spec.first_order,
                masks, wants[1], wants[3],
            )  # fmt: skip
        given = iter(found)
        own: list[Tensor | None] = [None] * len(flat)
        for mask, places in zip(masks, zip(*spec.places, strict=True), strict=True):
            for bit, k in enumerate(places):
                if k is not None and mask & (1 << bit):
                    own[k] = next(given)
        d_x_s = next(given) if wants[1] else None
        d_x_q = next(given) if wants[3] else None
        return (None, d_x_s, None, d_x_q, None, *own)


def _run_native(spec: Spec, data: tuple[Any, ...], tape: tapes.Tape | None) -> list[Tensor]:
    memory = None if tape is None else tape.tensor
    results: list[Tensor] = torch.ops.fastkfo.inner_loop_forward.default(
        *data, memory, *spec.arguments, spec.adapted
    )
    return results


def _outputs(found: InnerLoopResult, like: Tensor) -> list[Tensor]:
    """What the kernel returns, from what the reference does."""
    values = (found.loss, found.support_loss, found.predictions, found.statistics, found.finite)
    nothing = like.new_empty(0)
    return [nothing if x is None else x.detach() for x in (*values, *found.theta)]


def _multiple(ready: Sequence[Tensor], d_loss: Tensor | None) -> Sequence[Tensor] | None:
    """The gradients for cotangents that are equal for all tasks; None for others."""
    if d_loss is None:
        return None
    low, high = (float(x) for x in d_loss.aminmax())
    if low != high or low == 0.0:
        return None
    return ready if low == 1.0 else torch._foreach_mul(list(ready), low)


def _by_reference(
    spec: Spec,
    x_s: Tensor,
    y_s: Tensor,
    x_q: Tensor | None,
    y_q: Tensor | None,
    flat: Sequence[Tensor],
    graph: bool = False,
) -> InnerLoopResult:
    theta, left, right, bias, scale = spec.groups(flat)
    if spec.psd:
        left, right = ([None if x is None else x.mT @ x for x in group] for group in (left, right))
    loss, query_loss = (LOSSES[k] for k in spec.losses)
    found = reference.inner_loop(
        spec.layers, theta, left, right, bias, scale, x_s, y_s, x_q, y_q,
        alpha=spec.alpha, steps=spec.steps, loss=loss, query_loss=query_loss,
        first_order=spec.first_order, create_graph=graph,
    )  # fmt: skip
    seen = [x for x in (found.loss, found.support_loss) if x is not None]
    if found.loss is None and found.predictions is not None:
        seen.append(found.predictions)
    rows = [x.detach().isfinite().unsqueeze(1).flatten(1).all(1) for x in seen]
    return InnerLoopResult(
        found.loss, None if found.predictions is None else found.predictions.detach(),
        found.support_loss, found.theta if spec.adapted else [], found.statistics,
        torch.stack(rows).all(0),
    )  # fmt: skip


def _pulled_by_reference(
    spec: Spec,
    d_loss: Tensor | None,
    d_theta: Sequence[Tensor | None],
    x_s: Tensor,
    y_s: Tensor,
    x_q: Tensor | None,
    y_q: Tensor | None,
    flat: Sequence[Tensor],
    wants: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The vector-Jacobian product by autograd through the formula; differentiable itself."""
    create_graph = torch.is_grad_enabled()
    inputs: list[Any] = [x_s, y_s, x_q, y_q, *flat]
    if not create_graph:
        inputs = [
            x if x is None or not w else x.detach().requires_grad_()
            for x, w in zip(inputs, wants[1:], strict=True)
        ]
    with torch.enable_grad():
        a, b, c, d, *rest = inputs
        found = _by_reference(spec, a, b, c, d, rest, graph=True)
        pairs = [
            (x, c)
            for x, c in zip((found.loss, *found.theta), (d_loss, *d_theta), strict=False)
            if x is not None and c is not None and x.requires_grad
        ]
        live = [x for x, w in zip(inputs, wants[1:], strict=True) if w]
        grads = torch.autograd.grad(
            [x for x, _ in pairs], live, [c for _, c in pairs],
            create_graph=create_graph, allow_unused=True, materialize_grads=True,
        )  # fmt: skip
    given = iter(grads)
    return (None, *[next(given) if w else None for w in wants[1:]])


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
        _like(name, x, x_s)
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


def _like(name: str, x: object, like: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype} as x_s, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as x_s, got {x.device}")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {tuple(choices)}, got {value!r}")


def _loss_index(name: str, loss: str, reduction: str) -> int:
    _check_choice(name, loss, ("cross_entropy", "mse"))
    _check_choice("query_reduction", reduction, ("mean", "sum"))
    return LOSSES.index(f"{loss}_{reduction}")


def _shapes(layers: Sequence[Layer], count: int) -> list[tuple[int, ...]]:
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


def _check_operands(
    layers: Sequence[Layer], groups: list[list[Any]], x_s: Tensor, psd: bool
) -> None:
    tasks = x_s.shape[0]
    for i, shape in enumerate(_shapes(layers, len(groups[0]))):
        n, m = shape if len(shape) == 2 else (shape[0], 1)
        for name, group in zip(_GROUPS, groups, strict=True):
            x = group[i]
            if x is None:
                if name == "theta":
                    raise TypeError(f"theta: expected a tensor for parameter {i}, got NoneType")
                continue
            _like(f"{name} of parameter {i}", x, x_s)
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


def _rates(lr: Any, groups: list[list[Any]], layers: Sequence[Layer]) -> tuple[float, ...]:
    """One number per parameter; rates that are tensors become part of the scale."""
    count = len(groups[0])
    if isinstance(lr, (list, tuple)) and len(lr) != count:
        raise ValueError(f"lr: expected one rate per parameter, {count}, got {len(lr)}")
    rates = list(lr) if isinstance(lr, (list, tuple)) else [lr] * count
    shapes = _shapes(layers, count)
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
        groups[4][i] = times(rate, groups[4][i], shapes[i])
        alpha.append(1.0)
    return tuple(alpha)


def times(rate: Tensor, scale: Tensor | None, shape: Sequence[int]) -> Tensor:
    """A rate that is a tensor, as a scale or part of one."""
    whole = rate.reshape(()).expand(shape) if rate.numel() == 1 else rate
    return whole if scale is None else whole * scale
