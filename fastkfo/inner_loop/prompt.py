"""Large tasks, a few at a time, each with its gradient while it is in the caches.

A graph of all tasks lies in memory that nobody has touched before, and touching it takes as long as
the arithmetic. So the gradient is computed with the loss, for a cotangent of 1 of every task's;
gradients are linear in cotangents, and that of a sum or a mean is a multiple of it. For cotangents
that are not equal the pieces run again; where that happens often, their graphs are kept instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastkfo.inner_loop.ambience import Ambience
from fastkfo.inner_loop.cotangents import pulled, repeating
from fastkfo.inner_loop.inputs import Batch
from fastkfo.inner_loop.leaves import Leaves
from fastkfo.inner_loop.piece import Piece, Sums, together, whole
from fastkfo.inner_loop.run import Outcome, Run, fills_a_cache

IN_FLIGHT = 2  # large tasks, whatever the number of threads: random draws depend on it
MISSES = 3  # second runs, after which graphs are kept


def in_flight(batch: Batch, tasks: int, memory: str) -> int:
    """How many tasks run together: all, unless they are large, on a CPU, their graph whole."""
    large = memory == "full" and fills_a_cache(batch)
    return min(tasks, IN_FLIGHT) if large else tasks


class Habit:
    """Whether an inner loop computes gradients with losses, until that turns out not to pay.

    Attributes:
        why_not: why it no longer does, or None.
    """

    def __init__(self) -> None:
        self.why_not: str | None = None
        self.misses = 0

    def miss(self) -> None:
        """A gradient was of no use."""
        self.misses += 1
        if self.misses >= MISSES:
            self.why_not = "its losses had unequal weights, or were differentiated twice"

    def allows(self, leaves: Leaves) -> bool:
        """Whether a cotangent of 1 will do: not in float16, where it is scaled for a reason."""
        half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16
        halves = any([x.dtype == torch.float16 for x in leaves.flat()])
        return self.why_not is None and not half and not halves


class Unrolled:
    """How a piece runs: step by step, as a function of its own arguments."""

    def whole(self, run: Run, leaves: Leaves) -> Outcome:
        """The piece, with its graph."""
        return whole(run, leaves, graph=True)

    def own(self, piece: Piece, leaves: Leaves, differentiable: bool) -> Leaves:
        """Its arguments; if the gradient is differentiated again, with their graph."""
        if not differentiable:
            return piece.cut(leaves)
        # Aliases: an argument may depend on another, and its derivative must not go through that.
        return piece.leaves(leaves.like([x.view_as(x) for x in leaves.flat()]))


class Stray(Exception):
    """A loss depends on a tensor that is no argument of the inner loop, and wants a gradient."""


class Prompt(Function):
    """The query losses of pieces, whose gradient for cotangents of 1 is known already."""

    @staticmethod
    def forward(
        ctx: Any,
        turns: Iterator[Piece],
        pieces: list[Piece],
        box: list[Outcome],
        habit: Habit,
        way: Unrolled,
        shape: Leaves,
        *flat: Tensor,
    ) -> Tensor:
        """`[T]`; the pieces and all that came of them go into the lists."""
        leaves = shape.like(flat)
        ctx.pieces, ctx.shape, ctx.habit, ctx.way = pieces, shape, habit, way
        ctx.save_for_backward(*flat)
        ctx.set_materialize_grads(False)
        ctx.before, outcomes, sums = [], [], Sums(leaves)
        for piece in turns:
            pieces.append(piece)
            ctx.before.append(Ambience(flat[-1].device, piece.run.buffers))
            own = way.own(piece, leaves, differentiable=False)
            with torch.enable_grad():
                found = way.whole(piece.run, own)
            assert found.loss is not None
            if len(pieces) == 1 and has_strays(found.loss, own.flat()):
                torch.set_rng_state(ctx.before[0].cpu)
                raise Stray
            sums.add(pulled([found.loss], [torch.ones_like(found.loss)], own.flat()), own)
            outcomes.append(found._replace(loss=found.loss.detach()))
            piece.finish()
            piece.run.step.forget()
        ctx.gradients = sums.all()
        box.append(together(outcomes))
        loss = box[0].loss
        assert loss is not None
        return loss

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Any, ...]:
        """A multiple of what is known, or all of it again."""
        nothing = (None,) * 6
        if cotangent is None:
            return (*nothing, *[None] * (len(ctx.needs_input_grad) - 6))
        differentiable = torch.is_grad_enabled()
        leaves = ctx.shape.like(ctx.saved_tensors)  # raises if they were changed or let go of
        if not differentiable and bool((cotangent == cotangent[0]).all()):
            return (*nothing, *[g if g is None else g * cotangent[0] for g in ctx.gradients])
        ctx.habit.miss()
        sums = Sums(leaves)
        for piece, before in zip(ctx.pieces, ctx.before, strict=True):
            own = ctx.way.own(piece, leaves, differentiable)
            share = cotangent[piece.begin : piece.end]
            with before.again(), torch.enable_grad(), repeating(piece.run):
                loss = ctx.way.whole(piece.run, own).loss
                found = pulled([loss], [share], own.flat(), differentiable)
            piece.run.step.forget()
            sums.add(found, own)
        return (*nothing, *sums.all())


def has_strays(loss: Tensor, arguments: Sequence[Tensor]) -> bool:
    """Whether a graph has leaves that want a gradient and are none of the arguments."""
    known = {id(x) for x in arguments}
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            return True
        waiting += [following for following, _ in node.next_functions]
    return False
