"""The way of an `InnerLoop` that is one native call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkfo.inner_loop.buffers import TaskBuffers, commit
from fastkfo.inner_loop.fused import Fused
from fastkfo.inner_loop.inputs import Batch, is_one_batch
from fastkfo.inner_loop.known_models import Unfusable
from fastkfo.inner_loop.learner import BatchedLearner, check_count
from fastkfo.inner_loop.leaves import Leaves
from fastkfo.inner_loop.options import rule_of
from fastkfo.inner_loop.piece import Piece
from fastkfo.inner_loop.pieces import promptly
from fastkfo.inner_loop.prompt import Unrolled
from fastkfo.inner_loop.run import Outcome, Run, Settings

if TYPE_CHECKING:
    from fastkfo.inner_loop.inner_loop import InnerLoop


def fused_of(loop: InnerLoop, weights: Tensor | None) -> Fused:
    """The inner loop as one native call.

    Args:
        loop: the inner loop.
        weights: of the query losses after every step, or None.

    Returns:
        The call.

    Raises:
        Unfusable: it is not one.
    """
    if loop.backend not in ("auto", "fused"):
        raise Unfusable(f"backend={loop.backend!r}")
    if loop.memory != "full" or loop.chunk_size is not None or weights is not None:
        raise Unfusable("memory, chunk_size or step_weights ask for another path")
    fused = loop.remembered.get(loop.learner, loop.loss, loop.query_loss)
    if fused is None:
        if reason := loop.own_step():
            raise Unfusable(reason)
        rule = rule_of(loop.learner, loop.options)
        fused = Fused(rule, loop.loss, loop.query_loss)
        loop.remembered.keep(loop.learner, fused)
    return fused


def at_once(loop: InnerLoop, batch: Batch, steps: int | None) -> Outcome | None:
    """All of it without a detour, for the plainest of inputs; None for anything else."""
    if loop.features is not None or torch.is_inference_mode_enabled():
        return None
    if steps is not None:
        check_count("steps", steps, 0)
    try:
        fused = fused_of(loop, None)
        batch = fused.inputs(batch)
        if not is_one_batch(batch):
            return None
        found, parts = fused.outcome(
            batch, loop.steps if steps is None else steps, loop.buffer_mode
        )
    except Unfusable:
        return None
    commit(parts)
    return found


class Headed(Unrolled):
    """How a piece runs: features, then the native call for the head that is adapted.

    Args:
        fused: the call. It reads the learner's own parameters.
        settings: of the inner loop.
    """

    def __init__(self, fused: Fused, settings: Settings) -> None:
        self.fused, self.settings = fused, settings

    def whole(self, run: Run, leaves: Leaves) -> Outcome:
        """The piece."""
        batch = self.fused.inputs(run.featured(leaves))
        found, own = self.fused.outcome(batch, self.settings.steps, self.settings.buffers)
        run.buffers[:] = [*own, *run.buffers[1:]]
        return found

    def own(self, piece: Piece, leaves: Leaves, differentiable: bool) -> Leaves:
        """The learner's parameters as they are, features and data cut."""
        own = piece.leaves(leaves)
        if differentiable:
            return own
        cut = piece.cut(leaves)
        return own._replace(features=cut.features, data=cut.data)


def in_one_call(
    loop: InnerLoop, settings: Settings, batch: Batch, tasks: int, weights: Tensor | None
) -> tuple[Outcome, list[list[TaskBuffers]]]:
    """What comes of T tasks of equal shapes, and the buffers to be committed."""
    fused = fused_of(loop, weights)
    if loop.features is None:
        found, parts = fused.outcome(fused.inputs(batch), settings.steps, settings.buffers)
        return found, [parts]
    way, leaves = Headed(fused, settings), loop.leaves(batch, None)
    # The head's parameters are not cut: what hooks them must not see a gradient twice.
    hooked = any([x._backward_hooks for x in (*leaves.theta, *leaves.phi, *leaves.rates)])
    graph = torch.is_grad_enabled() and batch.y_q is not None and any(leaves.want())
    if graph and not hooked:
        prompt = promptly(settings, leaves, batch, tasks, loop.habit, way)
        if prompt is not None:
            return prompt
    run = Run(settings, batch, tasks, weighted=False)
    return way.whole(run, leaves), [run.buffers]


def adapted_at_once(loop: InnerLoop, learner: BatchedLearner, batch: Batch, steps: int) -> bool:
    """Whether all steps of a learner could be one native call; then it has taken them."""
    try:
        fused = fused_of(loop, None)
        if fused.model.norms:  # a learner's own passes write their statistics
            raise Unfusable("the model keeps running statistics")
        if fused.step.adapt:
            raise Unfusable("adapt_transform: a learner's transform is not returned by the call")
        theta = fused.run(fused.inputs(batch), steps, adapted=True).theta
    except Unfusable as refused:
        if loop.backend == "fused":
            raise refused.as_error() from refused
        return False
    learner.put(theta)
    return True
