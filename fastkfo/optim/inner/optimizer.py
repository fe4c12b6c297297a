"""Optimizers of inner loops as functions: updates and a state to directions and the next state.

Nothing is written in place, so that a meta-gradient goes through every step and every state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from fastkfo.optim.inner.checks import refuse_complex

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

    Attributes:
        real: whether it is not for complex parameters.
    """

    real: ClassVar[bool] = False

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

        Raises:
            TypeError: `direction` returned no pair of a tensor and a tuple of tensors, one of
                another dtype than the update's, or an update is complex where only real ones
                may be.
            ValueError: it returned one of another shape.
        """
        if self.real:
            refuse_complex("inner_optimizer", updates)
        found: list[Tensor | None] = list(updates)
        counts = list(state.counts or (0,) * len(found))
        buffers = list(state.buffers or ((),) * len(found))
        for i, update in enumerate(updates):
            if update is not None:
                made = self.direction(update, buffers[i], counts[i])
                found[i], buffers[i] = _checked(self, made, update)
                counts[i] += 1
        return found, OptimizerState(state.step + 1, tuple(counts), tuple(buffers))


def _checked(optimizer: InnerOptimizer, made: Any, update: Tensor) -> tuple[Tensor, Buffers]:
    """What `direction` made of an update, if it is what it must be."""
    name = f"{type(optimizer).__name__}.direction"
    if not isinstance(made, tuple) or len(made) != 2:
        raise TypeError(
            f"{name}: expected a direction and a tuple of buffers, got {type(made).__name__}"
        )
    found, buffers = made
    if not isinstance(found, Tensor) or found.dtype != update.dtype:
        got = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"{name}: expected a direction in {update.dtype} first, got {got}")
    if found.shape != update.shape:
        raise ValueError(
            f"{name}: expected a direction of shape {list(update.shape)} first, "
            f"got {list(found.shape)}"
        )
    if type(buffers) is not tuple or not all([isinstance(x, Tensor) for x in buffers]):
        got = type(buffers).__name__
        if type(buffers) is tuple:
            got = f"a tuple with {', '.join([type(x).__name__ for x in buffers])}"
        raise TypeError(f"{name}: expected a tuple of tensors second, got {got}")
    return found, buffers
