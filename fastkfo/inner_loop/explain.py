"""Which path each piece of an inner loop takes, and why, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastkfo.inner_loop.ambience import repeatable
from fastkfo.inner_loop.buffers import Unbatchable
from fastkfo.inner_loop.devices import check_devices
from fastkfo.inner_loop.inner_loop import InnerLoop
from fastkfo.inner_loop.inputs import Batch, check_batch, grouped
from fastkfo.inner_loop.loss import PerTask
from fastkfo.inner_loop.model import TaskModel
from fastkfo.inner_loop.prompt import in_flight
from fastkfo.inner_loop.recorder import EAGER_CALLS, of_devices, of_loop
from fastkfo.inner_loop.run import Run, features_alone
from fastkfo.inner_loop.step import Rule
from fastkfo.kernels import selector
from fastkfo.optim.inner import PerStepLR
from fastkfo.optim.recognise import kind_of, kronecker_part

_WAYS = {
    "chain": "all tasks in one pass, without vmap: linear layers and elementwise functions alone",
    "vmap": "all tasks in one pass, under torch.func.vmap with autograd outside of it",
    "each": "task after task",
}
_MEMORY = {
    "full": "full: the whole graph is kept; derivatives of any order",
    "checkpoint": "checkpoint: the state before every step is kept, every step is computed twice",
    "adjoint": "adjoint: θ before every step is kept, every step is computed twice",
}
_BUFFERS = {
    "shared": "shared: end up as learn2learn's loop leaves them",
    "frozen": "frozen: stay as they are",
    "per_task": "per_task: every task goes on with its own",
}


def explain(inner_loop: InnerLoop, x_s: Any, y_s: Any) -> None:
    """Print which path each piece of an inner loop takes for such tasks, and why.

    One forward and backward pass over the support is tried; nothing that is learned, no buffer and
    no random state changes.

    Args:
        inner_loop: the inner loop.
        x_s: support inputs, as for calling it.
        y_s: support targets, likewise.

    Raises:
        TypeError: `inner_loop` is none, or an input is of the wrong type.
        ValueError: inputs do not fit.
    """
    if not isinstance(inner_loop, InnerLoop):
        raise TypeError(f"inner_loop: expected an InnerLoop, got {type(inner_loop).__name__}")
    print("\n".join(lines(inner_loop, Batch(x_s, y_s))))


def lines(inner_loop: InnerLoop, given: Batch) -> Iterator[str]:
    """The explanation, line by line."""
    batches = [group.batch for group in grouped(given)] if isinstance(given.x_s, list) else [given]
    counts = [check_batch(batch) for batch in batches]
    check_devices(inner_loop.settings(), batches)
    tasks = sum(counts)
    shapes = "" if len(batches) == 1 else f" in {len(batches)} groups of equal shapes"
    yield f"tasks: {tasks}{shapes}, {inner_loop.steps} steps"
    reason = inner_loop.why_one_by_one()
    refused = inner_loop.why_not_fused(batches[0])
    if refused is None:
        yield "model: fused, all steps of all tasks and the meta-gradient in one native call"
    else:
        yield f"fused: no, {refused}"
    if refused is None:
        if inner_loop.features is not None:
            yield _features(features_alone(batches[0]))
    elif reason is None:
        yield from _tried(inner_loop, batches[0], counts[0])
    else:
        yield f"model: task after task ({reason})"
    yield from _inner(inner_loop.settings().rule)
    pieces = refused is not None or inner_loop.features is not None
    if pieces and reason is None and inner_loop.chunk_size is None:
        yield from _together(inner_loop, batches[0], counts[0])
    if refused is None:
        yield "memory: what one task needs, per thread; nothing is kept for the meta-gradient"
    else:
        yield f"memory: {_MEMORY[inner_loop.memory]}"
    if inner_loop.chunk_size is not None:
        yield (
            f"chunk_size: {inner_loop.chunk_size} tasks at a time; chunks keep nothing and run "
            "again in the backward pass"
        )
    yield f"buffers: {_BUFFERS[inner_loop.buffer_mode]}"
    yield f"capture: {_capture(inner_loop, batches[0], isinstance(given.x_s, list))}"


def _together(inner_loop: InnerLoop, batch: Batch, tasks: int) -> Iterator[str]:
    """How many tasks are in flight."""
    habit = inner_loop.habit
    asked = batch._replace(x_q=batch.x_s) if batch.x_q is None else batch
    size = in_flight(asked, tasks, inner_loop.memory)
    alike = "in flight, with as many queries:"
    if size == tasks:
        yield f"{alike} {tasks} tasks"
    elif habit.allows(inner_loop.leaves(batch, None)):
        yield f"{alike} {size} tasks, each with its gradient while it is in the processor's cache"
    else:
        yield f"{alike} {size} tasks, their graphs kept ({habit.why_not or 'float16'})"


def _tried(inner_loop: InnerLoop, batch: Batch, tasks: int) -> Iterator[str]:
    """What one pass over the support tells."""
    settings = inner_loop.settings()
    device = batch.tensors()[0].device
    with repeatable(device), torch.enable_grad():
        run = Run(settings, batch, tasks, weighted=False)
        leaves = inner_loop.leaves(batch, None)
        state = run.start(leaves)
        try:
            seen = run.featured(leaves)
            g, _ = run.gradient(state.theta, leaves.losses, seen, graph=True)
        except Unbatchable as refused:
            yield f"model: task after task ({refused})"
            return
    yield f"model: {_WAYS[run.model.way]}"
    yield from _functions("model", run.model)
    yield from _own_layers(device)
    if run.features is not None:
        yield _features(run.features.way == "each")
        yield from _functions("features", run.features)
    yield f"loss: {_loss(run.support.loss) if run.support.model is None else 'a module of its own'}"
    yield f"update: {_update(run, g)}"


def _own_layers(device: torch.device) -> Iterator[str]:
    why = selector.why_reference(str(device), "layers")
    if why is not None:
        yield f"  layers: PyTorch's own, since {why}"


def _features(alone: bool) -> str:
    if alone:
        return "features: task after task, each in the processor's cache"
    return "features: all samples of all tasks at once, batch norms per task"


def _functions(name: str, model: TaskModel) -> Iterator[str]:
    for function, form in sorted(model.replaced.items()):
        yield f"  {name}, {function}: {form}"


def _loss(loss: PerTask) -> str:
    if loss.has_kernel:
        return "all tasks in one call"
    return "task after task (vmap refused it)" if loss.each else "under torch.func.vmap{last}"


def _update(run: Run, g: list[Tensor | None]) -> str:
    step = run.step
    rule = run.settings.rule
    last = "one elementwise operation per parameter"
    if rule.inner.optimizer is not None:
        last = f"the optimizer and {last}"
    if step.transforms is None:
        return last
    known = [
        t is None or x is None or (kind_of(t) == "reshaped" and kronecker_part(t, x) is not None)
        for t, x in zip(step.transforms, g, strict=True)
    ]
    device = next(x.device for x in g if x is not None)
    chosen = selector.select("auto", device)
    own_rates = isinstance(rule.lr, PerStepLR) and not rule.lr.shared
    apart = rule.inner.optimizer is not None or own_rates
    op = "kron_transform" if apart else "kron_update"
    one = f"one {op} ({chosen} on {device.type}) for all parameters and tasks"
    if rule.adapt_transform:
        one += ", every task with factors of its own"
    last = f"; then {last}" if apart else ""
    if all(known):
        return one + last
    pairs = zip(step.transforms, known, strict=True)
    others = sorted({type(t).__name__ for t, is_known in pairs if not is_known})
    return f"{one}, but {', '.join(others)} under torch.func.vmap{last}"


def _inner(rule: Rule) -> Iterator[str]:
    """Clipping, the optimizer, rates per step."""
    inner, lr = rule.inner, rule.lr
    if inner.clip_norm is not None:
        yield f"clipping: every task's gradients, to a norm of {inner.clip_norm}"
    if inner.clip_value is not None:
        yield f"clipping: every number of a gradient, to ±{inner.clip_value}"
    if inner.optimizer is not None:
        yield f"inner optimizer: {inner.optimizer}, every task with a state of its own"
    if isinstance(lr, PerStepLR):
        yield f"lr: of every step its own, up to {lr.steps}{', shared' if lr.shared else ''}"


def _capture(inner_loop: InnerLoop, batch: Batch, listed: bool) -> str:
    if inner_loop.capture is False:
        return "off"
    if listed:
        return "none: a list of tasks"
    reason = of_devices(batch.tensors()) or of_loop(inner_loop) or inner_loop.recorder.failed
    if reason is not None:
        return f"none: {reason}"
    return f"CUDA graphs, from call {EAGER_CALLS + 1} of a shape on"
