"""The buffers of a clone that runs for T tasks at once.

A clone works on copies, so that the originals are as they were until all went well. Batch norms'
running statistics are recorded per task (statistics.py); a model that changes any other buffer
cannot run for several tasks at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastkfo.inner_loop.containment import select_rows
from fastkfo.inner_loop.statistics import Statistic, fold

MODES = ("shared", "frozen", "per_task")


class Unbatchable(RuntimeError):
    """A model cannot run for several tasks at once; the message says why."""


class Other:
    """A buffer that is not a batch norm's.

    Args:
        held: where its module keeps it, under `key`.
        key: see there.
        name: its full name.
        original: the parent's tensor.
    """

    def __init__(
        self, held: dict[str, Tensor | None], key: str, name: str, original: Tensor
    ) -> None:
        self.held, self.key, self.name, self.original = held, key, name, original
        copy = held[key]
        assert copy is not None
        self.copy, self.version = copy, copy._version
        self.own: dict[int, Tensor] = {}  # what a task has in its place

    def changed(self) -> bool:
        """Whether a pass wrote to the copy, or put something else in its place."""
        return self.held.get(self.key) is not self.copy or self.copy._version != self.version

    def put(self, value: Tensor) -> None:
        """Hold another copy."""
        self.held[self.key] = self.copy = value
        self.version = value._version
        self.own.clear()

    def enter(self, task: int, isolated: bool) -> None:
        """Hold what is this task's."""
        if isolated and task not in self.own:
            self.own[task] = self.copy.clone()
        self.held[self.key] = self.own.get(task, self.copy)

    def leave(self, task: int) -> None:
        """Remember what a task has put in the copy's place, and hold the copy again."""
        value = self.held.get(self.key)
        if value is not None and value is not self.copy:
            self.own[task] = value
        self.held[self.key] = self.copy


class Counter:
    """One `num_batches_tracked`. The module counts in its copy: once for all tasks.

    Args:
        original: the parent's tensor.
        copy: the clone's.
        folded: whether it is written with the statistics, since their average depends on it.
    """

    def __init__(self, original: Tensor, copy: Tensor, folded: bool) -> None:
        self.original, self.copy, self.version = original, copy, copy._version
        self.folded = folded

    def passes(self) -> int:
        """How many times the module has counted since this was asked last."""
        before, self.version = self.version, self.copy._version
        return self.version - before

    def rewind(self, value: Tensor) -> None:
        """Set the copy to a value; that is no count."""
        self.copy.copy_(value)

    def undo(self) -> None:
        """Count back what was not asked for yet."""
        if passes := self.passes():
            self.copy.sub_(passes)
            self.version = self.copy._version


class TaskBuffers:
    """The buffers of one clone.

    Args:
        module: the clone. Its buffers become copies; those that want a gradient are left alone.
        tasks: T, the number of tasks.
        mode: "shared": statistics go to the originals, by `commit`. "frozen": nowhere. "per_task":
            every task goes on with its own.
    """

    def __init__(self, module: nn.Module, tasks: int, mode: str) -> None:
        self.tasks, self.mode = tasks, mode
        self.recording = True  # not while a pass is repeated
        self.rows = slice(0, tasks)  # the tasks that a pass is of
        self.finite: Tensor | None = None  # the tasks whose inputs are, if not all of them
        self.one_by_one = False  # set by TaskModel
        self._pending: list[tuple[Statistic, Tensor, float, slice]] = []
        self.statistics: dict[int, Statistic] = {}  # by the identity of the copy
        self.counters: list[Counter] = []
        self.others: list[Other] = []
        memo: dict[int, Tensor] = {}
        for prefix, owner in module.named_modules():
            self._take_over(owner, f"{prefix}." if prefix else "", memo)

    def _take_over(self, owner: nn.Module, prefix: str, memo: dict[int, Tensor]) -> None:
        held = owner._buffers
        originals = {k: b for k, b in held.items() if b is not None and not b.requires_grad}
        for key, original in originals.items():
            held[key] = memo.setdefault(id(original), original.detach().clone())
        if isinstance(owner, _BatchNorm):
            count = originals.pop("num_batches_tracked", None)
            if count is not None:
                copy = held["num_batches_tracked"]
                assert copy is not None
                if all([counter.copy is not copy for counter in self.counters]):  # two names
                    self.counters.append(Counter(count, copy, owner.momentum is None))
            batches = count if owner.momentum is None else None
            for key in ("running_mean", "running_var"):
                copy = held.get(key)
                if key in originals and copy is not None:
                    original = originals.pop(key)
                    found = Statistic(original, copy, self.tasks, batches)
                    self.statistics.setdefault(id(copy), found)
        for key, original in originals.items():
            self.others.append(Other(held, key, prefix + key, original))

    def own(self, buffer: Tensor | None) -> Tensor | None:
        """With "per_task", `[T, C]` for a running statistic of `[C]`; else the buffer."""
        statistic = self.statistics.get(id(buffer))
        if statistic is None or self.mode != "per_task":
            return buffer
        return statistic.values()[self.rows]

    def record(self, buffer: Tensor | None, batch: Tensor, momentum: float) -> None:
        """A batch norm has seen these statistics, `[T', C]` for the tasks that the pass is of."""
        statistic = self.statistics.get(id(buffer))
        if statistic is None or not self.recording or self.mode == "frozen":
            return
        if self.finite is not None:
            batch = select_rows(self.finite[self.rows], batch, torch.nan)
        self._pending.append((statistic, batch, momentum, self.rows))

    def accept(self, unchanged: bool) -> None:
        """A pass is over: take up what it recorded.

        Args:
            unchanged: whether it may not have changed any buffer but those of batch norms.

        Raises:
            Unbatchable: it did; nothing is taken up.
        """
        for x in self.others if unchanged else ():
            if x.changed():
                raise Unbatchable(f"its forward changes the buffer {x.name!r}")
        for statistic, batch, momentum, rows in self._pending:
            if self.mode == "per_task":
                statistic.advance(batch, momentum, rows)
            else:
                statistic.record(batch, momentum, rows)
        self._pending.clear()

    def discard(self) -> None:
        """A pass failed: every copy is as it was before."""
        self._pending.clear()
        for counter in self.counters:
            counter.undo()
        for x in self.others:
            if x.changed():
                x.put(x.original.detach().clone())

    def write_back(self) -> None:
        """With "shared": what passes of one task after the other wrote to other buffers."""
        if self.mode != "shared" or not self.recording:
            return
        for x in self.others:
            if x.changed():
                with torch.no_grad():
                    x.original.copy_(x.copy)
                x.version = x.copy._version

    @contextmanager
    def one_task(self, task: int) -> Iterator[None]:
        """Within this, a pass is of one task alone."""
        isolated = self.mode != "shared"
        before = [(c, c.copy.clone(), c.copy._version, c.version) for c in self.counters]
        self.rows = slice(task, task + 1)
        for x in self.others:
            x.enter(task, isolated)
        try:
            yield
        finally:
            self.rows = slice(0, self.tasks)
            for x in self.others:
                x.leave(task)
            for counter, value, version, asked in before:
                counted = counter.copy._version - asked
                if task < self.tasks - 1:  # the last one's count stands for all
                    counter.rewind(value)
                    counted = version - asked
                counter.version = counter.copy._version - counted

    def snapshot(self) -> list[Tensor]:
        """Copies of all other buffers, from which a pass of one task can be repeated."""
        return [x.own.get(0, x.copy).detach().clone() for x in self.others]

    def restore(self, snapshot: Sequence[Tensor]) -> None:
        """Let a pass begin with a snapshot."""
        for x, value in zip(self.others, snapshot, strict=True):
            x.put(value.clone())


def commit(parts: Sequence[TaskBuffers], order: Sequence[int] | None = None) -> None:
    """With "shared": bring the originals to where learn2learn's loop would leave them.

    Args:
        parts: the buffers of clones of the same module, which share all tasks among them.
        order: see `fold`.
    """
    if not parts or parts[0].mode != "shared":
        return
    for statistics in zip(*[part.statistics.values() for part in parts], strict=True):
        fold(statistics, order)
    for part in parts:
        for counter in part.counters:
            passes = counter.passes()
            if passes and not counter.folded:
                with torch.no_grad():
                    counter.original.add_(passes * part.tasks)


def commit_all(parts: Sequence[Sequence[TaskBuffers]], order: Sequence[int] | None) -> None:
    """`commit` for every model of every part: the learner's, the feature extractor's."""
    for of_one_model in zip(*parts, strict=True):
        commit(of_one_model, order)
