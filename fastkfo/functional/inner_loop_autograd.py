"""The derivatives of a fused inner loop: by its kernel, and theirs by the formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastkfo.functional.inner_loop_spec import InnerLoopResult, Spec
from fastkfo.kernels import tapes
from fastkfo.reference import inner_loop as reference
from fastkfo.reference.inner_loop import LOSSES


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
    if torch.is_grad_enabled():
        outputs = InnerLoop.apply(spec, x_s, y_s, x_q, y_q, *flat)
    else:  # inside of it nobody could tell, and a gradient would be computed for nothing
        outputs = _without_graph(spec, x_s, y_s, x_q, y_q, flat)
    loss, support, predictions, statistics, finite, *theta = outputs
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
    are that multiple. Other cotangents take a second run, with a tape. On CUDA, where looking at
    cotangents would synchronise, there is always a tape.
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
        if not spec.native or not differentiable:
            results = _without_graph(spec, x_s, y_s, x_q, y_q, flat)
        elif y_q is not None and not spec.adapted and x_s.device.type == "cpu":
            results = torch.ops.fastkfo.inner_loop_gradient.default(
                *data, *spec.arguments, spec.first_order, spec.masks(wants[5:]), wants[1], wants[3]
            )
            ctx.ready, results = results[5:], results[:5]
        else:
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


def _without_graph(
    spec: Spec,
    x_s: Tensor,
    y_s: Tensor,
    x_q: Tensor | None,
    y_q: Tensor | None,
    flat: Sequence[Tensor],
) -> list[Tensor]:
    if spec.native:
        return _run_native(spec, (*spec.groups(flat), x_s, y_s, x_q, y_q), None)
    return _outputs(_by_reference(spec, x_s, y_s, x_q, y_q, flat), x_s)


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
    loss, query_loss = (LOSSES[k] for k in spec.losses)
    found = reference.inner_loop(
        spec.layers, theta, left, right, bias, scale, x_s, y_s, x_q, y_q,
        alpha=spec.alpha, steps=spec.steps, loss=loss, query_loss=query_loss,
        psd=spec.psd, adapt=spec.adapt, first_order=spec.first_order, create_graph=graph,
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
    # New tensors: one that is given twice, or made of another, would be asked for all of it twice.
    inputs = [
        x if x is None or not w else x.view_as(x) if create_graph else x.detach().requires_grad_()
        for x, w in zip(inputs, wants[1:], strict=True)
    ]
    with torch.enable_grad():
        found = _by_reference(
            spec, inputs[0], inputs[1], inputs[2], inputs[3], inputs[4:], graph=True
        )
        pairs = [
            (x, d)
            for x, d in zip((found.loss, *found.theta), (d_loss, *d_theta), strict=False)
            if x is not None and d is not None and x.requires_grad
        ]
        live = [x for x, w in zip(inputs, wants[1:], strict=True) if w]
        grads = torch.autograd.grad(
            [x for x, _ in pairs], live, [d for _, d in pairs],
            create_graph=create_graph, allow_unused=True, materialize_grads=True,
        )  # fmt: skip
    given = iter(grads)
    return (None, *[next(given) if w else None for w in wants[1:]])
