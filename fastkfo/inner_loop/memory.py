"""How much of an inner loop is kept for its meta-gradient.

"full"        the whole graph, which may be differentiated to any order (walk.unrolled).
"checkpoint"  the state before every step; a step is computed again, and differentiated as one.
"adjoint"     θ before every step (and φ, where it is adapted). With λ the cotangent of θ,

    V_k = (∂(θ_k − lr U(g_k))/∂g_k)ᵀ λ_{k+1}        λ_k = λ_{k+1} + H_k V_k

              where g_k is computed again and H_k V_k is one product with its Hessian.

docs/inner_loop.md has the derivation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastkfo.inner_loop.containment import finite_rows, select_rows
from fastkfo.inner_loop.inputs import Batch
from fastkfo.inner_loop.leaves import Layout, Leaves
from fastkfo.inner_loop.run import Run, State
from fastkfo.inner_loop.walk import Walk, cut

MODES = ("full", "checkpoint", "adjoint")


class Recomputed(Function):
    """The query losses of a run, which keeps states and no graph."""

    @staticmethod
    def forward(ctx: Any, run: Run, layout: Layout, shape: Leaves, *flat: Tensor) -> Tensor:
        """`[T]`; whatever else came of it is in `run.outcome`."""
        leaves = shape.like(flat)
        walk = Walk(run, leaves, layout.batch(leaves.data), keep=True)
        ctx.walk, ctx.layout, ctx.shape = walk, layout, shape
        ctx.save_for_backward(*flat)
        ctx.set_materialize_grads(False)
        run.outcome = walk.outcome
        assert walk.outcome.loss is not None
        return walk.outcome.loss

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Any, ...]:
        """Step by step."""
        check_differentiated_once("memory")
        if cotangent is None:
            return (None,) * (3 + len(ctx.needs_input_grad[3:]))
        leaves = ctx.shape.like(ctx.saved_tensors).detached()
        kind = _Adjoint if ctx.walk.run.settings.memory == "adjoint" else _Checkpoint
        backwards = kind(ctx.walk, leaves, ctx.layout.batch(leaves.data))
        return (None, None, None, *backwards(cotangent).flat())


class Cotangents(NamedTuple):
    """Of a state."""

    theta: list[Any]
    phi: list[Any]
    last: list[Any]


class _Backwards:
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
        count = len(self.leaves.theta)
        at = Cotangents([None] * count, [None] * len(self.leaves.phi), [None] * count)
        with repeating(run):
            for k in range(steps, -1, -1):
                if k == steps or (run.weighted and k > 0):
                    at = at._replace(theta=added(at.theta, self._query(k, cotangent)))
                if k > 0:
                    at = self.step(k - 1, at)
        self._add("theta", [c.sum(0) if c is not None else c for c in self._clean(at.theta)])
        if self.rule.adapt_transform:
            self._add("phi", [c.sum(0) if c is not None else c for c in self._clean(at.phi)])
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

    def _add(self, name: str, found: Sequence[Any]) -> None:
        group = getattr(self.sums, name)
        group[:] = added(group, found)

    def _clean(self, rows: list[Any]) -> list[Any]:
        """The cotangents without the rows that are not finite."""
        good = finite_rows(rows, self.run.tasks)
        if good is None:
            return rows
        return [None if c is None else select_rows(good, c, 0.0) for c in rows]


class _Checkpoint(_Backwards):
    """Every step as one function of the state before it."""

    def step(self, k: int, at: Cotangents) -> Cotangents:
        """See `_Backwards`."""
        run, state, count = self.run, self.walk.states[k], len(self.leaves.theta)
        adapted = self.rule.adapt_transform
        theta = cut(state.theta, run.own)
        phi = cut(state.phi, run.learned) if adapted else self.leaves.phi
        last = None if state.last is None else cut(state.last, [True] * count)
        with self.walk.before[k].again(), torch.enable_grad():
            new, _ = run.after_step(State(theta, phi, last), self.leaves, self.batch, True)
        outputs = [*new.theta, *(new.phi if adapted else ()), *(new.last or ())]
        cotangents = [*at.theta, *(at.phi if adapted else ()), *(at.last if adapted else ())]
        inputs = [*theta, *(phi if adapted else ()), *(last or ())]
        groups = ["rates", "losses", "data", *(() if adapted else ("phi",))]
        found = self._pull(outputs, cotangents, inputs, groups)
        middle = count + (len(phi) if adapted else 0)
        return Cotangents(
            found[:count],
            found[count:middle] if adapted else at.phi,
            found[middle:] if last is not None else [None] * count,
        )


class _Gradient(NamedTuple):
    """g_k with its graph, and the θ_k that it is a function of."""

    theta: list[Tensor]
    g: list[Tensor | None]


class _Adjoint(_Backwards):
    """The recursion: the update's own derivative, then one Hessian-vector product."""

    def __init__(self, walk: Walk, leaves: Leaves, batch: Batch) -> None:
        super().__init__(walk, leaves, batch)
        self.ahead: _Gradient | None = None  # computed for the step after it

    def step(self, k: int, at: Cotangents) -> Cotangents:
        """See `_Backwards`."""
        run, state, second = self.run, self.walk.states[k], not self.rule.first_order
        here = self._gradient(k) if self.ahead is None else self.ahead
        moves = self.rule.adapt_transform and k > 0
        self.ahead = before = self._gradient(k - 1) if moves else None
        count = len(self.leaves.theta)
        g = cut(here.g, [second] * count)
        last = cut(before.g, [second] * count) if before is not None else None
        adapted = self.rule.adapt_transform
        phi = cut(state.phi, run.learned) if adapted else self.leaves.phi
        with torch.enable_grad():
            still = State([p.detach() for p in here.theta], phi, last)
            moved, phi_after = run.moved(still, g, self.leaves.rates)
        inputs = [*g, *(phi if adapted else ()), *(last or ())]
        found = self._pull(
            [*moved, *(phi_after if adapted else ())],
            [*at.theta, *(at.phi if adapted else ())],
            inputs,
            ["rates", *(() if adapted else ("phi",))],
        )
        middle = count + (len(phi) if adapted else 0)
        v = added(found[:count], at.last)
        theta = at.theta
        if second:
            theta = added(theta, self._pull(here.g, v, here.theta, ("losses", "data")))
        return Cotangents(
            theta,
            found[count:middle] if adapted else at.phi,
            found[middle:] if last is not None else [None] * count,
        )

    def _gradient(self, k: int) -> _Gradient:
        theta = cut(self.walk.states[k].theta, self.run.own)
        with self.walk.before[k].again():
            g, _ = self.run.gradient(theta, self.leaves.losses, self.batch, graph=True)
        return _Gradient(theta, g)


def pulled(
    outputs: Sequence[Any],
    cotangents: Sequence[Any],
    inputs: Sequence[Any],
    differentiable: bool = False,
) -> list[Any]:
    """Vector-Jacobian products; None for an input that nothing depends on or that wants none."""
    pairs = [
        (x, c)
        for x, c in zip(outputs, cotangents, strict=True)
        if x is not None and c is not None and x.requires_grad
    ]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad(
            [x for x, _ in pairs],
            wanted,
            [c for _, c in pairs],
            create_graph=differentiable,
            allow_unused=True,
        )
    )
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]


def added(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    """Sums, None counting as zero."""
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


def check_differentiated_once(option: str) -> None:
    """Raise if a graph of the backward pass is asked for: there is none to be had."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{option}: expected memory='full' without chunks where the meta-gradient is "
            "differentiated again (create_graph=True); what is computed again can be once"
        )


@contextmanager
def repeating(run: Run) -> Iterator[None]:
    """Within this, no running statistic moves: it has moved already."""
    for buffers in run.buffers:
        buffers.recording = False
    try:
        yield
    finally:
        for buffers in run.buffers:
            buffers.recording = True
