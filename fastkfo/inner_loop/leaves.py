"""Every tensor that a meta-gradient can reach, as one flat list: what autograd Functions take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastkfo.inner_loop.inputs import Batch


class Leaves(NamedTuple):
    """The arguments of an inner loop.

    Attributes:
        theta: the learner's parameters, without a task axis.
        phi: the transforms' parameters.
        rates: the learning rates that are tensors.
        state: of the optimizer, where the learner has taken steps already.
        features: the feature extractor's parameters.
        losses: the parameters of the losses that are modules.
        weights: the weights of the steps' query losses, one tensor or none.
        data: the tensors of the batch.
    """

    theta: list[Tensor]
    phi: list[Tensor]
    rates: list[Tensor]
    state: list[Tensor]
    features: list[Tensor]
    losses: list[Tensor]
    weights: list[Tensor]
    data: list[Tensor]

    def flat(self) -> list[Tensor]:
        """All of them."""
        return [x for group in self for x in group]

    def like(self, flat: Sequence[Any]) -> Leaves:
        """The same arrangement of other values."""
        values = iter(flat)
        return Leaves(*[[next(values) for _ in group] for group in self])

    def want(self) -> list[bool]:
        """Which of them require a gradient."""
        return [x.requires_grad for x in self.flat()]

    def shape(self) -> Leaves:
        """The arrangement alone."""
        return self.like([None] * sum(map(len, self)))

    def detached(self) -> Leaves:
        """The tensors without their graph; those that required a gradient still do."""
        return self.like([x.detach().requires_grad_(x.requires_grad) for x in self.flat()])


class Layout:
    """How the tensors of a batch make up its pytrees.

    Args:
        batch: the batch. It is not kept.
    """

    def __init__(self, batch: Batch) -> None:
        leaves, self.spec = tree_flatten(tuple(batch))
        self.rest = [None if isinstance(x, Tensor) else (x,) for x in leaves]

    def batch(self, tensors: Sequence[Tensor]) -> Batch:
        """The batch of these tensors."""
        given = iter(tensors)
        leaves = [next(given) if rest is None else rest[0] for rest in self.rest]
        return Batch(*tree_unflatten(leaves, self.spec))
