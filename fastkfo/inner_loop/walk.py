"""Inner loops forwards: with their graph, or step by step without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkfo.inner_loop.ambience import Ambience
from fastkfo.inner_loop.containment import Contained
from fastkfo.inner_loop.inputs import Batch
from fastkfo.inner_loop.leaves import Leaves
from fastkfo.inner_loop.run import Outcome, Run, State, outcome
from fastkfo.inner_loop.step import Last


def unrolled(run: Run, leaves: Leaves, batch: Batch) -> tuple[Outcome, State]:
    """All steps, with their graph; and the state after the last."""
    state = run.start(leaves)
    support: list[Tensor] = []
    queries: list[Tensor] = []
    predictions: Any = None
    for k in range(run.settings.steps):
        state, loss = run.after_step(state, leaves, batch, graph=True)
        support.append(loss)
        if run.weighted:
            query, predictions = run.ask(state.theta, leaves.losses, batch)
            queries.append(_weighted(leaves.weights[0][k], query))
    if run.weighted:
        total = torch.stack(queries).sum(0)
    else:
        total, predictions = run.ask(state.theta, leaves.losses, batch)
    return outcome(total, predictions, support, run.tasks, leaves.data[0]), state


def _weighted(weight: Tensor, query: Tensor) -> Tensor:
    """A step's weight, which all tasks share, times their query losses."""
    contained = Contained(query.shape[0])
    (entered,) = contained.enter([query])
    assert entered is not None
    return contained.leave([weight * entered])[0]


class Walk:
    """All steps, without their graph.

    Args:
        run: the tasks.
        leaves: the arguments.
        batch: the tasks' data, behind the feature extractor.
        keep: whether the backward pass shall be possible.

    Attributes:
        outcome: what came of it.
        states: before every step, and after the last.
        before: the ambience of every step.
        asked: that of every pass over the query.
        queries: the losses of these.
    """

    def __init__(self, run: Run, leaves: Leaves, batch: Batch, keep: bool) -> None:
        self.run, self.keep = run, keep
        self.states: list[State] = []
        self.before: list[Ambience] = []
        self.asked: list[Ambience] = []
        self.queries: list[Tensor] = []
        self._device = leaves.data[0].device
        with torch.no_grad():
            self.outcome = self._all(leaves, batch)

    def _all(self, leaves: Leaves, batch: Batch) -> Outcome:
        run, steps = self.run, self.run.settings.steps
        state = run.start(leaves)
        support: list[Tensor] = []
        predictions: Any = None
        for k in range(steps):
            self._remember(state, self.before)
            state, loss = run.after_step(self._cut(state), leaves, batch, graph=False)
            state = _ended(state)
            support.append(loss)
            if run.weighted or k == steps - 1:
                predictions = self._ask(state, leaves, batch)
        if steps == 0:
            predictions = self._ask(state, leaves, batch)
        self.states.append(state)
        total = None
        if self.queries:
            total = self.queries[-1]
            if run.weighted:
                pairs = zip(leaves.weights[0], self.queries, strict=True)
                total = torch.stack([w * query for w, query in pairs]).sum(0)
        return outcome(total, predictions, support, run.tasks, leaves.data[0])

    def _ask(self, state: State, leaves: Leaves, batch: Batch) -> Any:
        if self.keep:
            self.asked.append(Ambience(self._device, self.run.buffers))
        loss, predictions = self.run.ask(state.theta, leaves.losses, batch)
        if loss is not None:
            self.queries.append(loss)
        return predictions

    def _remember(self, state: State, where: list[Ambience]) -> None:
        if self.keep:
            where.append(Ambience(self._device, self.run.buffers))
            adjoint = self.run.settings.memory == "adjoint"  # computes the last gradients again
            self.states.append(state._replace(last=None) if adjoint else state)

    def _cut(self, state: State) -> State:
        """The state, to be differentiated in."""
        phi = state.phi
        if self.run.settings.rule.adapt_transform:
            phi = cut(phi, self.run.learned)
        return state._replace(theta=cut(state.theta, self.run.own), phi=phi)


def _ended(state: State) -> State:
    """The state, in nobody's graph."""

    def ended(tensors: Sequence[Any]) -> list[Any]:
        return cut(tensors, [False] * len(tensors))

    inner, last = state.inner, state.last
    if last is not None:
        last = Last(ended(last.g), last.state.like(ended(last.state.flat())))
    return State(ended(state.theta), ended(state.phi), inner.like(ended(inner.flat())), last)


def cut(tensors: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    """The tensors without their graph; those that are wanted require a gradient."""
    return [
        None if x is None else x.detach().requires_grad_(w)
        for x, w in zip(tensors, wanted, strict=True)
    ]
