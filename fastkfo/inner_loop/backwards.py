"""The walks back of the memory modes that keep states: see memory.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkfo.inner_loop.containment import finite_rows, select_rows
from fastkfo.inner_loop.cotangents import added, pulled, repeating
from fastkfo.inner_loop.inputs import Batch
from fastkfo.inner_loop.leaves import Leaves
from fastkfo.inner_loop.run import State
from fastkfo.inner_loop.step import Last
from fastkfo.inner_loop.walk import Walk, cut
from fastkfo.optim.inner import OptimizerState


class Cotangents(NamedTuple):
    """Of a state.

    Attributes:
        theta: of θ.
        phi: of φ, where it is adapted.
        inner: of the optimizer's state.
        g: of the gradients of the step before, where φ steps through it.
        before: of the optimizer's state before that.
    """

    theta: list[Any]
    phi: list[Any]
    inner: list[Any]
    g: list[Any]
    before: list[Any]


class Backwards:
    """The walk back.

    Args:
        walk: the walk.
        leaves: its arguments, as leaves of new graphs.
        batch: its data, made of these.
    """

    def __init__(self, walk: Walk, leaves: Leaves, batch: Batch) -> None:
        self.walk, self.run, self.leaves, self.batch = walk, walk.run, leaves, batch
        self.rule = walk.run.settings.rule
        self.sums = leaves.shape()

    def __call__(self, cotangent: Tensor) -> Leaves:
        """The gradients of all arguments, None where there is none."""
        run, steps = self.run, self.run.settings.steps
        last = self.walk.states[-1]
        at = Cotangents(*[[None] * len(group) for group in self._groups(last)])
        with repeating(run):
            for k in range(steps, -1, -1):
                if k == steps or (run.weighted and k > 0):
                    at = at._replace(theta=added(at.theta, self._query(k, cotangent)))
                if k > 0:
                    at = self.step(k - 1, at)
        self._add_rows("theta", at.theta)
        self._add_rows("state", at.inner)
        if self.rule.adapt_transform:
            self._add_rows("phi", at.phi)
        return self.sums

    def step(self, k: int, at: Cotangents) -> Cotangents:
        """From the cotangents after step k to those before it."""
        raise NotImplementedError

    def _query(self, k: int, cotangent: Tensor) -> list[Any]:
        """What reaches θ_k from the query loss there."""
        index = k - 1 if self.run.weighted else 0
        if self.run.weighted:
            weights = self.leaves.weights[0]
            if weights.requires_grad:
                self._add_weight(index, cotangent)
            cotangent = cotangent * weights.detach()[index]
        theta = cut(self.walk.states[k].theta, self.run.own)
        with self.walk.asked[index].again(), torch.enable_grad():
            loss, _ = self.run.ask(theta, self.leaves.losses, self.batch)
        return self._pull([loss], [cotangent], theta, ("losses", "data"))

    def _add_weight(self, index: int, cotangent: Tensor) -> None:
        value = (cotangent * self.walk.queries[index]).nan_to_num(0.0, 0.0, 0.0).sum()
        gradient = torch.zeros_like(self.leaves.weights[0])
        gradient[index] = value
        self._add("weights", [gradient])

    def _pull(
        self,
        outputs: Sequence[Any],
        cotangents: Sequence[Any],
        inputs: Sequence[Any],
        groups: Sequence[str],
    ) -> list[Any]:
        """Vector-Jacobian products in the inputs; those in groups of arguments are added up."""
        members = [getattr(self.leaves, name) for name in groups]
        found = pulled(outputs, cotangents, [*inputs, *[x for group in members for x in group]])
        place = len(inputs)
        for name, group in zip(groups, members, strict=True):
            self._add(name, found[place : place + len(group)])
            place += len(group)
        return found[: len(inputs)]

    def _through(
        self, state: State, new: State, at: Cotangents, groups: Sequence[str]
    ) -> Cotangents:
        """From the cotangents of a new state to those of the one that it was computed from."""
        inputs = self._groups(state)
        found = iter(
            self._pull(
                [x for group in self._groups(new) for x in group],
                [c for group in at for c in group],
                [x for group in inputs for x in group],
                groups if self.rule.adapt_transform else (*groups, "phi"),
            )
        )
        return Cotangents(*[[next(found) for _ in group] for group in inputs])

    def _groups(self, state: State) -> list[list[Any]]:
        """The tensors of a state, in the order of `Cotangents`."""
        last = state.last
        return [
            state.theta,
            state.phi if self.rule.adapt_transform else [],
            state.inner.flat(),
            [] if last is None else last.g,
            [] if last is None else last.state.flat(),
        ]

    def _leaf(self, state: State, theta: list[Tensor], g: list[Any] | None) -> State:
        """A state as a leaf of new graphs.

        Args:
            state: the state.
            theta: its θ, cut.
            g: the gradients of the step before, cut, where φ steps through it.

        Returns:
            The leaf.
        """
        phi = cut(state.phi, self.run.learned) if self.rule.adapt_transform else self.leaves.phi
        last = None
        if g is not None:
            assert state.last is not None
            last = Last(g, _cut(state.last.state))
        return State(theta, phi, _cut(state.inner), last)

    def _add(self, name: str, found: Sequence[Any]) -> None:
        group = getattr(self.sums, name)
        group[:] = added(group, found)

    def _add_rows(self, name: str, rows: list[Any]) -> None:
        """Add up the tasks' cotangents, without the rows that are not finite."""
        good = finite_rows(rows, self.run.tasks)
        if good is not None:
            rows = [None if c is None else select_rows(good, c, 0.0) for c in rows]
        self._add(name, [c if c is None else c.sum(0) for c in rows])


def _cut(state: OptimizerState) -> OptimizerState:
    buffers = state.flat()
    return state.like(cut(buffers, [True] * len(buffers)))


class Checkpoint(Backwards):
    """Every step as one function of the state before it."""

    def step(self, k: int, at: Cotangents) -> Cotangents:
        """See `Backwards`."""
        state = self.walk.states[k]
        last = None if state.last is None else cut(state.last.g, [True] * len(state.theta))
        leaf = self._leaf(state, cut(state.theta, self.run.own), last)
        with self.walk.before[k].again(), torch.enable_grad():
            new, _ = self.run.after_step(leaf, self.leaves, self.batch, True)
        return self._through(leaf, new, at, ("rates", "losses", "data"))


class _Gradient(NamedTuple):
    """g_k with its graph, and the θ_k that it is a function of."""

    theta: list[Tensor]
    g: list[Tensor | None]


class Adjoint(Backwards):
    """The recursion: the update's own derivative, then one Hessian-vector product."""

    def __init__(self, walk: Walk, leaves: Leaves, batch: Batch) -> None:
        super().__init__(walk, leaves, batch)
        self.ahead: _Gradient | None = None  # computed for the step after it

    def step(self, k: int, at: Cotangents) -> Cotangents:
        """See `Backwards`."""
        second, state = not self.rule.first_order, self.walk.states[k]
        here = self._gradient(k) if self.ahead is None else self.ahead
        self.ahead = last = None
        if self.rule.adapt_transform and k > 0:
            self.ahead = self._gradient(k - 1)
            state = state._replace(last=Last(self.ahead.g, self.walk.states[k - 1].inner))
            last = cut(self.ahead.g, [second] * len(state.theta))
        leaf = self._leaf(state, [p.detach() for p in here.theta], last)
        g = cut(here.g, [second] * len(here.g))
        with torch.enable_grad():
            new = self.run.moved(leaf, g, self.leaves.rates)
        found = self._through(leaf._replace(theta=g), new, at, ("rates",))
        theta = at.theta
        if second:
            reached = self._pull(here.g, found.theta, here.theta, ("losses", "data"))
            theta = added(theta, reached)
        return found._replace(theta=theta)

    def _gradient(self, k: int) -> _Gradient:
        theta = cut(self.walk.states[k].theta, self.run.own)
        with self.walk.before[k].again():
            g, _ = self.run.gradient(theta, self.leaves.losses, self.batch, graph=True)
        return _Gradient(theta, g)
