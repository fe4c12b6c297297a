"""Running statistics of T tasks at once, folded as learn2learn's loop leaves them.

There all forward passes of the first task come first, then all of the second. One pass maps a
running statistic r to `(1 − m) r + m b`, so any number of them is `decay · r + addend`, and T tasks
are T such maps, one after the other. A cumulative average (`momentum=None`) is a sum and a count.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from fastkfo.inner_loop.guards import sent


class Statistic:
    """One running mean or variance, `[C]`, and what T tasks do to it.

    Args:
        original: the parent's tensor; only `fold` writes to it.
        copy: what the clone's module holds in its place, as it was when it was cloned.
        tasks: T, the number of tasks.
        batches: the original count of batches, where the average is cumulative.
    """

    def __init__(self, original: Tensor, copy: Tensor, tasks: int, batches: Tensor | None) -> None:
        self.original, self.copy, self.tasks, self.batches = original, copy, tasks, batches
        self.own: Tensor | None = None  # [T, C], where every task goes on with its own
        self.changed = False
        self.version = -1

    def _begin(self) -> None:
        """Begin with the original as it is now: at first, and when somebody else changed it."""
        original = self.original
        self.version = original._version
        self.base = original.detach().clone()
        self.before = None if self.batches is None else self.batches.clone()
        self.decay = original.new_ones(self.tasks)
        self.addend = original.new_zeros(self.tasks, *original.shape)
        self.count = original.new_zeros(self.tasks)

    def record(self, batch: Tensor, momentum: float, rows: slice) -> None:
        """Take up what the tasks in `rows` saw, `[T', C]`; what is not finite does not count."""
        if self.original._version != self.version:
            self._begin()
        self.changed = True
        batch = batch.detach().to(self.addend.dtype)
        plain = self.batches is None and batch.device.type == "cpu"
        if plain and isfinite(batch.sum().item()):  # the usual case, in a quarter of the calls
            self.addend[rows].lerp_(batch, momentum)
            self.decay[rows] *= 1 - momentum
            return
        good = batch.isfinite().all(1)
        batch = torch.where(good.unsqueeze(1), batch, 0.0)
        if self.batches is not None:
            self.addend[rows] += batch
            self.count[rows] += good
            return
        kept = 1 - momentum * good.to(batch.dtype)
        self.addend[rows] = torch.addcmul(momentum * batch, kept.unsqueeze(1), self.addend[rows])
        self.decay[rows] *= kept

    def advance(self, batch: Tensor, momentum: float, rows: slice) -> None:
        """Move the own statistics of the tasks in `rows` on."""
        own = self.values().clone()
        own[rows] = own[rows].lerp(batch.detach().to(own.dtype), momentum)
        self.own = own

    def values(self) -> Tensor:
        """`[T, C]`: every task's own statistic."""
        return self.copy.expand(self.tasks, -1) if self.own is None else self.own


def fold(parts: Sequence[Statistic], order: Sequence[int] | None = None) -> None:
    """Write what all passes so far, task after task, make of the original.

    Args:
        parts: the tasks, in one piece or several, of one and the same original.
        order: the places in the concatenated pieces that the first task is in, the second, ...;
            None where they lie in order.
    """
    seen = [part for part in parts if part.changed]
    if not seen:
        return
    first = seen[0]
    for part in parts:
        if not part.changed:  # a piece that saw nothing changes nothing
            part._begin()

    def rows(name: str) -> Tensor:
        joined = torch.cat([getattr(part, name) for part in parts])
        return joined if order is None else joined[sent(order, joined.device)]

    if first.batches is not None:
        before = first.before.to(first.base.dtype)  # type: ignore[union-attr]
        total = before + rows("count").sum()
        new = (first.base * before + rows("addend").sum(0)) / total.clamp(min=1)
        new = torch.where(total > 0, new, first.base)
        with torch.no_grad():
            first.batches.copy_(total)  # what did not count in the average must not in the next
    else:
        # What a task added is decayed by all tasks that come after it.
        later = rows("decay").flip(0).cumprod(0).flip(0)
        weights = torch.cat([later[1:], later.new_ones(1)])
        new = later[0] * first.base + weights @ rows("addend")
    with torch.no_grad():
        first.original.copy_(new)
    for part in parts:
        part.version, part.changed = first.original._version, False
