"""learn2learn's own loop, for learners whose step is known only as `clone` and `adapt`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastkfo.inner_loop.inputs import Batch, joined, parted
from fastkfo.inner_loop.loss import PerTask
from fastkfo.inner_loop.options import refused_by_clone
from fastkfo.inner_loop.piece import together
from fastkfo.inner_loop.run import Outcome, Settings, outcome
from fastkfo.inner_loop.trees import map_tensors

if TYPE_CHECKING:
    from fastkfo.inner_loop.inner_loop import InnerLoop


def by_clones(
    learner: Any, options: dict[str, Any], settings: Settings, batch: Batch, weights: Any
) -> Outcome:
    """Adapt one clone per task.

    Args:
        learner: what is cloned.
        options: of `clone`.
        settings: see there.
        batch: the tasks.
        weights: of the query losses after every step, or None.

    Returns:
        What came of it.
    """
    graph = torch.is_grad_enabled()
    tasks = len(tree_leaves(batch.x_s)[0])
    with torch.enable_grad():
        found = [
            _one(learner.clone(**options), settings, batch.rows(t, t + 1), weights)
            for t in range(tasks)
        ]
    if not graph:
        found = [x._replace(loss=None if x.loss is None else x.loss.detach()) for x in found]
    return together(found)


def _one(clone: nn.Module, settings: Settings, row: Batch, weights: Any) -> Outcome:
    if settings.features is not None:
        row = _featured(settings.features, row)
    x_s, y_s, x_q, y_q = row.map(lambda x: x[0])
    support: list[Tensor] = []
    queries: list[Tensor] = []
    predictions: Any = None

    def ask() -> None:
        nonlocal predictions
        predictions = clone(x_q)
        if y_q is not None:
            queries.append(_of_one(settings.query_loss)(predictions, y_q))

    for _ in range(settings.steps):
        loss = _of_one(settings.loss)(clone(x_s), y_s)
        clone.adapt(loss)  # type: ignore[operator]
        support.append(loss.detach().reshape(1))
        if weights is not None:
            ask()
    if weights is None:
        ask()
    total = None
    if queries:
        total = queries[-1]
        if weights is not None:
            pairs = zip(weights, queries, strict=True)
            total = torch.stack([w * q.reshape(1) for w, q in pairs]).sum(0)
        total = total.reshape(1)
        if not bool(torch.stack([*support, total.detach()]).isfinite().all()):
            total = total.detach()  # its gradient is nothing, not NaN
    predictions = map_tensors(lambda x: x.unsqueeze(0), predictions)
    return outcome(total, predictions, support, 1, tree_leaves(row.x_s)[0])


def _featured(features: nn.Module, row: Batch) -> Batch:
    both = map_tensors(lambda x: x[0], joined(row.x_s, row.x_q))
    seen = map_tensors(lambda x: x.unsqueeze(0), features(both))
    x_s, x_q = parted(seen, row.x_s)
    return row._replace(x_s=x_s, x_q=x_q)


def _of_one(loss: Any) -> Any:
    return loss.loss if isinstance(loss, PerTask) else loss


def check_clones(loop: InnerLoop, reason: str) -> None:
    """Refuse options that a loop over clones does not have.

    Args:
        loop: the inner loop.
        reason: why its tasks run as clones.

    Raises:
        ValueError: an option is set.
    """
    if (name := refused_by_clone(loop.learner, loop.options)) is not None:
        kind = type(loop.learner).__name__
        raise ValueError(f"{name}: expected None, as {kind}.clone has no such option: {reason}")
    options = {
        "memory": (loop.memory, "full"),
        "buffers": (loop.buffer_mode, "shared"),
        "chunk_size": (loop.chunk_size, None),
        "backend": (loop.backend, "auto" if loop.backend != "loop" else "loop"),
    }
    for name, (value, only) in options.items():
        if value != only:
            raise ValueError(f"{name}: expected {only!r} for this learner, got {value!r}: {reason}")
