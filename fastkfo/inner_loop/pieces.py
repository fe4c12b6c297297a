"""A group of tasks run piece by piece: all at once, in chunks, or one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastkfo.inner_loop.ambience import Ambience
from fastkfo.inner_loop.buffers import TaskBuffers
from fastkfo.inner_loop.inputs import Batch
from fastkfo.inner_loop.leaves import Layout, Leaves
from fastkfo.inner_loop.memory import (
    Recomputed,
    added,
    check_differentiated_once,
    pulled,
    repeating,
)
from fastkfo.inner_loop.run import Outcome, Run, Settings
from fastkfo.inner_loop.trees import map_tensors
from fastkfo.inner_loop.walk import Walk, unrolled


class Piece(NamedTuple):
    """Tasks that run together."""

    begin: int
    end: int
    run: Run

    def leaves(self, leaves: Leaves) -> Leaves:
        """The arguments, with these tasks' data."""
        return leaves._replace(data=[x[self.begin : self.end] for x in leaves.data])


def run_pieces(
    settings: Settings, leaves: Leaves, batch: Batch, tasks: int, size: int, again: bool
) -> tuple[Outcome, list[list[TaskBuffers]]]:
    """Run T tasks, `size` at a time.

    Args:
        settings: see there.
        leaves: the arguments.
        batch: the tasks.
        tasks: T.
        size: how many run together.
        again: whether pieces keep nothing for the meta-gradient and run again instead.

    Returns:
        What came of it, and every piece's buffers, not committed yet.
    """
    weighted = bool(leaves.weights)
    ranges = [(begin, min(begin + size, tasks)) for begin in range(0, tasks, size)]
    # Each is made in its turn: it begins with the buffers that the one before has left.
    turns = (Piece(b, e, Run(settings, batch, e - b, weighted)) for b, e in ranges)
    pieces: list[Piece] = []
    graph = torch.is_grad_enabled() and batch.y_q is not None and any(leaves.want())
    if graph and again and len(ranges) > 1:
        box: list[Outcome] = []
        loss = Chunked.apply(turns, pieces, box, leaves.shape(), *leaves.flat())
        found = box[0]._replace(loss=loss)
    else:
        outcomes = []
        for piece in turns:
            pieces.append(piece)
            outcomes.append(_piece(piece, leaves, graph))
        found = together(outcomes)
    return found, [piece.run.buffers for piece in pieces]


def _piece(piece: Piece, leaves: Leaves, graph: bool) -> Outcome:
    with torch.set_grad_enabled(graph):
        found = whole(piece.run, piece.leaves(leaves), graph)
    for buffers in piece.run.buffers:
        buffers.write_back()
    return found


def whole(run: Run, leaves: Leaves, graph: bool) -> Outcome:
    """A run from its arguments, features included, in its memory mode."""
    batch = run.featured(leaves)
    inner = leaves._replace(features=[], data=batch.tensors())
    if not graph:
        return Walk(run, inner, batch, keep=False).outcome
    if run.settings.memory == "full":
        return unrolled(run, inner, batch)[0]
    loss = Recomputed.apply(run, Layout(batch), inner.shape(), *inner.flat())
    found, run.outcome = run.outcome, None
    assert found is not None
    return found._replace(loss=loss)


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
        shape, count = ctx.shape, len(ctx.needs_input_grad) - 4
        if cotangent is None:
            return (*nothing, *[None] * count)
        leaves = shape.like(ctx.saved_tensors)
        shared: list[Any] = [None] * (count - len(shape.data))
        rows: list[list[Any]] = [[] for _ in shape.data]
        for piece, before in zip(ctx.pieces, ctx.before, strict=True):
            own = piece.leaves(leaves)
            wants = [*own.want()[: len(shared)], *[x.requires_grad for x in leaves.data]]
            own = own.like(
                [x.detach().requires_grad_(w) for x, w in zip(own.flat(), wants, strict=True)]
            )
            with before.again(), torch.enable_grad(), repeating(piece.run):
                loss = whole(piece.run, own, graph=True).loss
                found = pulled([loss], [cotangent[piece.begin : piece.end]], own.flat())
            piece.run.step.forget()
            shared = added(shared, found[: len(shared)])
            for of_tensor, x, like in zip(rows, found[len(shared) :], own.data, strict=True):
                of_tensor.append(torch.zeros_like(like) if x is None else x)
        data = [
            torch.cat(of_tensor) if x.requires_grad else None
            for of_tensor, x in zip(rows, leaves.data, strict=True)
        ]
        return (*nothing, *shared, *data)


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of all tasks from those of the pieces."""
    if len(outcomes) == 1:
        return outcomes[0]
    losses, predictions, support, finite = zip(*outcomes, strict=True)
    return Outcome(
        None if losses[0] is None else torch.cat(losses),
        map_tensors(lambda *parts: torch.cat(parts), *predictions),
        torch.cat(support),
        torch.cat(finite),
    )


def in_order(found: Sequence[Outcome], order: Tensor | None) -> Outcome:
    """The outcome of tasks of unlike shapes: their predictions are a list."""
    predictions = [
        map_tensors(lambda x: x[k], part.predictions)  # noqa: B023
        for part in found
        for k in range(len(part.finite))
    ]
    joined = together([part._replace(predictions=None) for part in found])
    if order is None:
        return joined._replace(predictions=predictions)
    loss, _, support, finite = [None if x is None else x[order.to(x.device)] for x in joined]
    return Outcome(loss, [predictions[int(k)] for k in order], support, finite)  # type: ignore[arg-type]
