"""Optimizers of inner loops as functions: updates and a state to directions and the next state.

Nothing is written in place, so that a meta-gradient goes through every step and every state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

Buffers = tuple[Tensor, ...]


class OptimizerState(NamedTuple):
    """What an inner loop carries from step to step beside its parameters.

    Attributes:
        step: how many steps were taken.
        counts: per parameter, how many of them had a gradient for it. Empty before the first.
        buffers: per parameter the optimizer's tensors, of its shape; none, which stands for zeros,
            before its first gradient. They are never written to.
    """

    step: int = 0
    counts: tuple[int, ...] = ()
    buffers: tuple[Buffers, ...] = ()

    def flat(self) -> list[Tensor]:
        """All buffers, one after the other."""
        return [x for own in self.buffers for x in own]

    def like(self, flat: Sequence[Any]) -> OptimizerState:
        """The same state with other buffers, given as `flat` gives them."""
        values = iter(flat)
        return self._replace(
            buffers=tuple([tuple([next(values) for _ in x]) for x in self.buffers])
        )

    def next(self) -> OptimizerState:
        """One step later, the buffers as they are."""
        return self._replace(step=self.step + 1)

    def detached(self) -> OptimizerState:
        """The same without a graph."""
        return self.like([x.detach() for x in self.flat()])

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizerState:
        """A copy without a graph, as a detached module's copy has none."""
        return self.like([x.detach().clone() for x in self.flat()])


START = OptimizerState()


class InnerOptimizer:
    """What makes a direction of the update of every parameter; a learning rate multiplies it.

    A subclass defines `direction`, and is best a frozen dataclass of numbers: it is shared by all
    clones.
    """

    def direction(self, update: Tensor, buffers: Buffers, count: int) -> tuple[Tensor, Buffers]:
        """The direction of one parameter.

        Args:
            update: its gradient, clipped and transformed, of the parameter's shape. In a batch all
                tensors have a leading axis of tasks: what is computed must be elementwise.
            buffers: what the last call for the parameter returned; empty in the first.
            count: how many calls there were before.

        Returns:
            The direction, which is subtracted times the learning rate, and the new buffers.
        """
        raise NotImplementedError

    def directions(
        self, updates: Sequence[Tensor | None], state: OptimizerState
    ) -> tuple[list[Tensor | None], OptimizerState]:
        """The directions of all parameters.

        Args:
            updates: one per parameter; None leaves the parameter, and its state, as they are.
            state: before the step.

        Returns:
            One direction or None per parameter, and the state after the step.
        """
        found: list[Tensor | None] = list(updates)
        counts = list(state.counts or (0,) * len(found))
        buffers = list(state.buffers or ((),) * len(found))
        for i, update in enumerate(updates):
            if update is not None:
                found[i], buffers[i] = self.direction(update, buffers[i], counts[i])
                counts[i] += 1
        return found, OptimizerState(state.step + 1, tuple(counts), tuple(buffers))
