"""A group of tasks run piece by piece: all at once, in chunks, or one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastkfo.inner_loop.ambience import Ambience
from fastkfo.inner_loop.buffers import TaskBuffers
from fastkfo.inner_loop.cotangents import check_differentiated_once, pulled, repeating
from fastkfo.inner_loop.inputs import Batch
from fastkfo.inner_loop.leaves import Leaves
from fastkfo.inner_loop.piece import Piece, Sums, together, whole
from fastkfo.inner_loop.prompt import Habit, Prompt, Stray, Unrolled, in_flight
from fastkfo.inner_loop.run import Outcome, Run, Settings

Found = tuple[Outcome, list[list[TaskBuffers]]]


def run_pieces(
    settings: Settings,
    leaves: Leaves,
    batch: Batch,
    tasks: int,
    size: int,
    habit: Habit,
    again: bool,
) -> Found:
    """Run T tasks, `size` at a time.

    Args:
        settings: see there.
        leaves: the arguments.
        batch: the tasks.
        tasks: T, the number of tasks.
        size: how many run together.
        habit: whether gradients may be computed with the losses.
        again: whether pieces keep nothing for the meta-gradient and run again instead.

    Returns:
        What came of it, and every piece's buffers, not committed yet.
    """
    graph = torch.is_grad_enabled() and batch.y_q is not None and any(leaves.want())
    if not again and not settings.each and size == tasks:
        size = in_flight(batch, tasks, settings.memory)
        found = promptly(settings, leaves, batch, tasks, habit, Unrolled()) if graph else None
        if found is not None:
            return found
    if graph and again and size < tasks:
        return _by(Chunked, (), settings, leaves, batch, tasks, size)
    outcomes, pieces = [], []
    for piece in _turns(settings, leaves, batch, tasks, size):
        pieces.append(piece)
        outcomes.append(_piece(piece, leaves, graph))
    return together(outcomes), [piece.run.buffers for piece in pieces]


def promptly(
    settings: Settings, leaves: Leaves, batch: Batch, tasks: int, habit: Habit, way: Unrolled
) -> Found | None:
    """Run T tasks, a few at a time, each with its gradient; None if that is not to be."""
    size = in_flight(batch, tasks, settings.memory)
    if size < tasks and habit.allows(leaves):
        try:
            return _by(Prompt, (habit, way), settings, leaves, batch, tasks, size)
        except Stray:
            habit.why_not = "a loss depends on tensors that are no arguments of the inner loop"
    return None


def _by(
    function: Any,
    options: tuple[Any, ...],
    settings: Settings,
    leaves: Leaves,
    batch: Batch,
    tasks: int,
    size: int,
) -> Found:
    """Through an autograd Function, which adds its pieces and their outcome to lists."""
    turns = _turns(settings, leaves, batch, tasks, size)
    pieces: list[Piece] = []
    box: list[Outcome] = []
    loss = function.apply(turns, pieces, box, *options, leaves.shape(), *leaves.flat())
    return box[0]._replace(loss=loss), [piece.run.buffers for piece in pieces]


def _turns(
    settings: Settings, leaves: Leaves, batch: Batch, tasks: int, size: int
) -> Iterator[Piece]:
    """Piece after piece, each made in its turn: with the buffers that the one before has left."""
    weighted = bool(leaves.weights)
    for begin in range(0, tasks, size):
        end = min(begin + size, tasks)
        yield Piece(begin, end, Run(settings, batch, end - begin, weighted))


def _piece(piece: Piece, leaves: Leaves, graph: bool) -> Outcome:
    with torch.set_grad_enabled(graph):
        found = whole(piece.run, piece.leaves(leaves), graph)
    piece.finish()
    return found


class Chunked(Function):
    """The query losses of pieces that keep nothing and run again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        turns: Iterator[Piece],
        pieces: list[Piece],
        box: list[Outcome],
        shape: Leaves,
        *flat: Tensor,
    ) -> Tensor:
        """`[T]`; the pieces and all that came of them go into the lists."""
        leaves = shape.like(flat)
        ctx.pieces, ctx.shape = pieces, shape
        ctx.save_for_backward(*flat)
        ctx.set_materialize_grads(False)
        ctx.before, outcomes = [], []
        for piece in turns:
            pieces.append(piece)
            ctx.before.append(Ambience(flat[-1].device, piece.run.buffers))
            outcomes.append(_piece(piece, leaves, graph=False))
            piece.run.step.forget()
        box.append(together(outcomes))
        loss = box[0].loss
        assert loss is not None
        return loss

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Any, ...]:
        """Piece after piece."""
        check_differentiated_once("chunk_size")
        nothing = (None,) * 4
        if cotangent is None:
            return (*nothing, *[None] * (len(ctx.needs_input_grad) - 4))
        leaves = ctx.shape.like(ctx.saved_tensors)
        sums = Sums(leaves)
        for piece, before in zip(ctx.pieces, ctx.before, strict=True):
            own = piece.cut(leaves)
            with before.again(), torch.enable_grad(), repeating(piece.run):
                loss = whole(piece.run, own, graph=True).loss
                found = pulled([loss], [cotangent[piece.begin : piece.end]], own.flat())
            piece.run.step.forget()
            sums.add(found, own)
        return (*nothing, *sums.all())
