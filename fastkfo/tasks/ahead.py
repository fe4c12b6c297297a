"""Several meta-batches in one draw, for learners whose step is as short as a draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastkfo.tasks import checks
from fastkfo.tasks.distribution import Episodes, TaskDistribution

__all__ = ["DrawAhead"]


class DrawAhead(TaskDistribution):
    """Draws ``batches`` meta-batches at once and hands them out one by one.

    A small draw costs calls, not numbers: many meta-batches then cost little more than one. They
    are held in memory until all were handed out; asking for another number of tasks than the last
    time discards what is left. Not for large images.

    Args:
        distribution: What to draw from. It should not be sampled by anyone else meanwhile.
        batches: How many meta-batches are one draw.

    Raises:
        TypeError: If distribution is none, or batches no integer.
        ValueError: If batches is below 1.

    Example:
        >>> tasks = DrawAhead(FewShotTasks(features, labels, 5, 5, 5), batches=16)
        >>> x_s, y_s, x_q, y_q = tasks.sample(16)
    """

    def __init__(self, distribution: TaskDistribution, batches: int = 16) -> None:
        if not isinstance(distribution, TaskDistribution):
            raise TypeError(
                f"distribution: expected a TaskDistribution, got {type(distribution).__name__}"
            )
        checks.count("batches", batches)
        self.distribution, self.batches, self.device = distribution, batches, distribution.device
        self._forget()

    def _forget(self) -> None:
        self._before = self.distribution.state_dict()
        self._block: list[Episodes] = []
        self._tasks = self._taken = 0

    def _draw(self, tasks: int) -> Episodes:
        if tasks != self._tasks or self._taken == self.batches:
            self._refill(tasks)
        self._taken += 1
        return self._block[self._taken - 1]

    def _refill(self, tasks: int) -> None:
        self._before = self.distribution.state_dict()
        parts = [t.split(tasks) for t in self.distribution.sample(tasks * self.batches)]
        self._block = [Episodes(*each) for each in zip(*parts, strict=True)]
        self._tasks, self._taken = tasks, 0

    def state_dict(self) -> dict[str, Any]:
        """What a training that is resumed needs to draw the same tasks, bit for bit.

        Returns:
            The state before the block that is being handed out, and the place in it.
        """
        place = {"batches": self.batches, "tasks": self._tasks, "taken": self._taken}
        return {"distribution": self._before, **place}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from where ``state_dict`` was taken; draws the block there once more.

        Args:
            state_dict: Of a `DrawAhead` with the same options.

        Raises:
            TypeError: If it is no mapping, or a number in it is none.
            ValueError: If its keys are others, or its numbers do not fit this object, or the
                distribution refuses its state. Everything is then as it was.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
        if set(state_dict) != {"distribution", "batches", "tasks", "taken"}:
            raise ValueError(
                "state_dict: expected the keys distribution, batches, tasks and taken, got "
                f"{sorted(state_dict)}"
            )
        tasks, taken = state_dict["tasks"], state_dict["taken"]
        checks.integer("state_dict['tasks']", tasks)
        checks.integer("state_dict['taken']", taken)
        if state_dict["batches"] != self.batches:
            raise ValueError(
                f"state_dict['batches']: expected {self.batches}, got {state_dict['batches']}"
            )
        if tasks < 0 or not (1 if tasks else 0) <= taken <= (self.batches if tasks else 0):
            raise ValueError(
                f"state_dict: expected a place among {self.batches} meta-batches, got "
                f"tasks={tasks}, taken={taken}"
            )
        self.distribution.load_state_dict(state_dict["distribution"])
        self._forget()
        if tasks:
            self._refill(tasks)
            self._taken = taken
