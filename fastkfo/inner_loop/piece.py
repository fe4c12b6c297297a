"""Tasks that run together, and how what comes of several such pieces is put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkfo.inner_loop.cotangents import added
from fastkfo.inner_loop.guards import sent
from fastkfo.inner_loop.leaves import Layout, Leaves
from fastkfo.inner_loop.memory import Recomputed
from fastkfo.inner_loop.run import Outcome, Run
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

    def cut(self, leaves: Leaves) -> Leaves:
        """The same without their graph; those that required a gradient still do."""
        own = self.leaves(leaves)
        return own.like(
            [
                x.detach().requires_grad_(like.requires_grad)
                for x, like in zip(own.flat(), leaves.flat(), strict=True)
            ]
        )

    def finish(self) -> None:
        """Its forward pass is over."""
        for buffers in self.run.buffers:
            buffers.write_back()


class Sums:
    """The gradients of all arguments, from those of pieces: added up, or row by row.

    Args:
        leaves: the arguments.
    """

    def __init__(self, leaves: Leaves) -> None:
        self.data = leaves.data
        self.shared: list[Any] = [None] * (len(leaves.flat()) - len(self.data))
        self.rows: list[list[Tensor]] = [[] for _ in self.data]

    def add(self, found: Sequence[Tensor | None], own: Leaves) -> None:
        """Take up the gradients of a piece's own arguments."""
        count = len(self.shared)
        self.shared = added(self.shared, found[:count])
        for rows, x, like in zip(self.rows, found[count:], own.data, strict=True):
            rows.append(torch.zeros_like(like) if x is None else x)

    def all(self) -> list[Tensor | None]:
        """In the order of the arguments."""
        joined = [
            torch.cat(rows) if x.requires_grad else None
            for rows, x in zip(self.rows, self.data, strict=True)
        ]
        return [*self.shared, *joined]


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


def in_order(found: Sequence[Outcome], order: Sequence[int] | None) -> Outcome:
    """The outcome of tasks of unlike shapes: their predictions are a list."""
    predictions = [
        map_tensors(lambda x: x[k], part.predictions)  # noqa: B023
        for part in found
        for k in range(len(part.finite))
    ]
    joined = together([part._replace(predictions=None) for part in found])
    if order is None:
        return joined._replace(predictions=predictions)
    rows = sent(order, joined.finite.device)
    loss, _, support, finite = [None if x is None else x[rows] for x in joined]
    return Outcome(loss, [predictions[k] for k in order], support, finite)  # type: ignore[arg-type]
