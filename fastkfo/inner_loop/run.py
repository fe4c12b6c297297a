"""K inner steps and the query loss of T tasks of equal shapes, as functions of explicit tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fastkfo.inner_loop import forms
from fastkfo.inner_loop.containment import Contained, finite_rows, spread
from fastkfo.inner_loop.inputs import Batch, joined, parted
from fastkfo.inner_loop.leaves import Layout, Leaves
from fastkfo.inner_loop.loss import PerTask, per_task
from fastkfo.inner_loop.model import TaskModel, shell_of
from fastkfo.inner_loop.step import InnerStep, Last, Rule
from fastkfo.inner_loop.trees import map_tensors
from fastkfo.optim.differentiate import gradients
from fastkfo.optim.inner import START, OptimizerState
from fastkfo.utils import ParameterSlots


@dataclass(frozen=True)
class Settings:
    """What does not change from one group of tasks to the next.

    Attributes:
        rule: how the learner adapts.
        loss: of a task's support.
        query_loss: of a task's query.
        features: a feature extractor that is not adapted, or None.
        steps: K, the number of steps.
        memory: "full", "checkpoint" or "adjoint".
        buffers: "shared", "frozen" or "per_task".
        each: whether the model runs task after task.
    """

    rule: Rule
    loss: Any
    query_loss: Any
    features: nn.Module | None
    steps: int
    memory: str
    buffers: str
    each: bool


class State(NamedTuple):
    """Where the tasks are before a step.

    Attributes:
        theta: θ, `[T, ...]`; without T where a parameter is frozen.
        phi: φ, `[T, ...]` where it is adapted.
        inner: the optimizer's state, `[T, ...]`.
        last: with an adapted φ, what the step before started from.
    """

    theta: list[Tensor]
    phi: list[Tensor]
    inner: OptimizerState = START
    last: Last | None = None


class Outcome(NamedTuple):
    """What comes of a run.

    Attributes:
        loss: query losses `[T]`, or None.
        predictions: of the query, `[T, Q, ...]`, detached; None without query inputs.
        support_loss: `[T, K]`, detached: the losses that were adapted to.
        finite: `[T]`, whether a task's losses all are (its predictions, without a query loss).
    """

    loss: Tensor | None
    predictions: Any
    support_loss: Tensor
    finite: Tensor


# Numbers of one task's inputs from which its activations alone fill a processor's cache.
LARGE_TASK = 1 << 15


def fills_a_cache(batch: Batch) -> bool:
    """Whether features of one task after the other are faster than of all at once: on a CPU."""
    inputs = [x for x in tree_leaves((batch.x_s, batch.x_q)) if isinstance(x, Tensor)]
    numbers = sum([x.numel() // max(len(x), 1) for x in inputs])
    return numbers >= LARGE_TASK and all([x.device.type == "cpu" for x in inputs])


def features_alone(batch: Batch) -> bool:
    """Whether features are computed task after task: of large ones, on kernels of PyTorch's."""
    inputs = [x for x in tree_leaves(batch.x_s) if isinstance(x, Tensor)]
    return fills_a_cache(batch) and not all([forms.has_kernels(x) for x in inputs])


class Run:
    """One group of tasks.

    Args:
        settings: see there.
        batch: the tasks; only their arrangement is kept.
        tasks: T, the number of tasks.
        weighted: whether the query loss is the weighted sum of those after every step.
    """

    def __init__(self, settings: Settings, batch: Batch, tasks: int, weighted: bool) -> None:
        self.settings, self.tasks, self.weighted = settings, tasks, weighted
        rule, each = settings.rule, settings.each
        self.layout = Layout(batch)
        self.model = TaskModel(shell_of(rule.module), tasks, settings.buffers, each)
        self.own = self.model.own
        self.step = InnerStep(rule, tasks)
        slots = self.step.slots
        self.learned = [] if slots is None else [p.requires_grad for p in slots.params]
        self.features: TaskModel | None = None
        if settings.features is not None:
            none = [False] * len(ParameterSlots(settings.features).params)
            alone = each or features_alone(batch)
            self.features = TaskModel(
                shell_of(settings.features), tasks, settings.buffers, alone, none
            )
        models = [self.model] if self.features is None else [self.model, self.features]
        self.buffers = [model.buffers for model in models]
        self.outcome: Outcome | None = None  # of a run inside an autograd Function
        self.support = TaskLoss(settings.loss, tasks, each)
        self.query = (
            self.support
            if settings.query_loss is settings.loss
            else TaskLoss(settings.query_loss, tasks, each)
        )

    def start(self, leaves: Leaves) -> State:
        """θ, φ and the optimizer's state before the first step."""
        pairs = list(zip(leaves.theta, self.own, strict=True))
        rows = iter(spread([p for p, own in pairs if own], self.tasks))
        theta = [next(rows) if own else p for p, own in pairs]
        rule = self.settings.rule
        phi = spread(leaves.phi, self.tasks) if rule.adapt_transform else list(leaves.phi)
        return State(theta, phi, rule.state.like(spread(leaves.state, self.tasks)))

    def featured(self, leaves: Leaves) -> Batch:
        """The batch, its inputs taken through the feature extractor."""
        batch = self.layout.batch(leaves.data)
        if self.features is None:
            return batch
        both = batch.x_s if batch.x_q is None else joined(batch.x_s, batch.x_q)
        contained = Contained(self.tasks)
        entered = contained.enter(tree_leaves(both))
        self.features.buffers.finite = contained.rows
        seen = self.features(leaves.features, False, (_like(both, entered),), {})
        seen = _like(seen, contained.leave(tree_leaves(seen)))
        if batch.x_q is None:
            return batch._replace(x_s=seen)
        x_s, x_q = parted(seen, batch.x_s)
        return batch._replace(x_s=x_s, x_q=x_q)

    def gradient(
        self, theta: list[Tensor], losses: list[Tensor], batch: Batch, graph: bool
    ) -> tuple[list[Tensor | None], Tensor]:
        """The gradients at θ, differentiable if `graph` and not first order; and the losses."""
        rule = self.settings.rule
        create_graph = graph and not rule.first_order
        with torch.enable_grad():
            # The same kernels with and without a graph: steps that are repeated must agree.
            predictions = self.model(theta, not rule.first_order, (batch.x_s,), {})
            with _named("loss", "y_s"):
                loss = self.support(losses, not rule.first_order, predictions, batch.y_s)
            g = gradients(
                loss.sum(), theta, create_graph, create_graph, rule.allow_unused, rule.allow_nograd
            )
        return g, loss.detach()

    def moved(self, state: State, g: list[Tensor | None], rates: list[Tensor]) -> State:
        """The state after a step along g."""
        rule, phi = self.settings.rule, state.phi
        if state.last is not None:
            phi = self.step.phi(phi, rates, state.last, g, rule.allow_unused)
        theta, inner = self.step.theta(state.theta, phi, rates, g, state.inner)
        return State(theta, phi, inner, Last(g, state.inner) if rule.adapt_transform else None)

    def after_step(
        self, state: State, leaves: Leaves, batch: Batch, graph: bool
    ) -> tuple[State, Tensor]:
        """The state after one step, and the support losses before it."""
        self.step.check(state.inner)
        g, loss = self.gradient(state.theta, leaves.losses, batch, graph)
        return self.moved(state, g, leaves.rates), loss

    def ask(self, theta: list[Tensor], losses: list[Tensor], batch: Batch) -> tuple[Any, Any]:
        """Query losses `[T]`, or None without targets, and predictions."""
        if batch.x_q is None:
            return None, None
        second_order = not self.settings.rule.first_order  # the kernels of the support, repeatable
        predictions = self.model(theta, second_order, (batch.x_q,), {})
        if batch.y_q is None:
            return None, predictions
        own = losses if self.query is self.support else losses[self.support.count :]
        with _named("loss" if self.query is self.support else "query_loss", "y_q"):
            return self.query(own, False, predictions, batch.y_q), predictions


class TaskLoss:
    """A loss for T tasks; one with parameters of its own runs as a model does."""

    def __init__(self, loss: Any, tasks: int, each: bool) -> None:
        self.tasks, self.model = tasks, None
        self.count = 0
        if isinstance(loss, nn.Module) and next(loss.parameters(), None) is not None:
            self.model = TaskModel(shell_of(loss), tasks, "frozen", each)
            self.own = self.model.own
            self.count = len(self.own)
        else:
            self.loss: PerTask = per_task(loss)

    def __call__(
        self, params: Sequence[Tensor], second_order: bool, predictions: Any, targets: Any
    ) -> Tensor:
        """`[T]`."""
        if self.model is None:
            return self.loss(predictions, targets)
        rows = iter(spread([p for p, o in zip(params, self.own, strict=False) if o], self.tasks))
        theta = [next(rows) if o else p for p, o in zip(params, self.own, strict=False)]
        found = self.model(theta, second_order, (predictions, targets), {})
        if not isinstance(found, Tensor) or found.shape != (self.tasks,):
            got = list(found.shape[1:]) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"loss: expected one number per task, got {got} for each")
        return found


@contextmanager
def _named(loss: str, targets: str) -> Iterator[None]:
    """Errors of a loss with the names that the caller knows its arguments by."""
    try:
        yield
    except ValueError as error:
        for own, known in (("loss: ", loss), ("targets: ", targets)):
            if str(error).startswith(own):
                raise ValueError(f"{known}: {str(error)[len(own) :]}") from error
        raise


def _like(tree: Any, leaves: Sequence[Any]) -> Any:
    return tree_unflatten(list(leaves), tree_flatten(tree)[1])


def outcome(
    loss: Tensor | None, predictions: Any, support: list[Tensor], tasks: int, like: Tensor
) -> Outcome:
    """Put together what a run has given."""
    detached = map_tensors(lambda x: x.detach(), predictions)
    if support:
        losses = torch.stack(support, 1)
    else:
        kind = loss if loss is not None else like
        dtype = kind.dtype if kind.is_floating_point() else torch.get_default_dtype()
        losses = like.new_zeros(tasks, 0, dtype=dtype)
    seen = [x for x in (loss, losses) if x is not None and x.numel()]
    if loss is None and predictions is not None:
        seen += [x for x in tree_leaves(detached) if isinstance(x, Tensor)]
    rows = finite_rows(seen, tasks)
    if rows is None:
        rows = losses.new_ones(tasks, dtype=torch.bool)
    return Outcome(loss, detached, losses, rows)
