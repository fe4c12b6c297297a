"""What a fused inner loop is called with and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkfo.reference.inner_loop import KINDS, Layer

GROUPS = ("theta", "left", "right", "bias", "scale")  # in the order of their bits
# Forms that the kernels may choose from, as bits: csrc/inner_loop/plan.h.
FORMS = {"dense": 1, "factored": 2, "gram": 4, "auto": 7}


class InnerLoopResult(NamedTuple):
    """What `inner_loop` returns.

    Attributes:
        loss: query losses `[T]`; None without `y_q`.
        predictions: of the query, `[T, Q, C]`, detached; None without `x_q`.
        support_loss: `[T, K]`, the losses that were adapted to, detached.
        theta: θ_K, `[T, ...]` per parameter; empty unless asked for.
        statistics: mean and biased variance of every batch norm in every pass, detached:
            `[T, K + 1, F]` (K without `x_q`), F being twice the features of all of them.
        finite: `[T]`, whether a task's losses are (its predictions, without a query loss).
    """

    loss: Tensor | None
    predictions: Tensor | None
    support_loss: Tensor
    theta: list[Tensor]
    statistics: Tensor
    finite: Tensor


class Spec:
    """Everything about a call that is no tensor.

    Args:
        layers: the model.
        present: which operands there are, one bit mask per parameter.
        alpha: one learning rate per parameter.
        steps: K, the number of steps.
        losses: the support's and the query's, indices into `LOSSES`.
        psd: whether factors are squared.
        first_order: whether gradients are constants.
        adapted: whether θ_K is returned.
        native: whether the kernels run.
        form: in which the kernels compute it, one of `FORMS`.
        adapt: whether the transform takes steps too.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        present: Sequence[int],
        alpha: Sequence[float],
        steps: int,
        losses: tuple[int, int],
        psd: bool,
        first_order: bool,
        adapted: bool,
        native: bool,
        form: str = "auto",
        adapt: bool = False,
    ) -> None:
        self.layers, self.present, self.alpha = layers, present, alpha
        self.steps, self.losses, self.psd = steps, losses, psd
        self.first_order, self.adapted, self.native = first_order, adapted, native
        numbers: list[int] = []
        for layer in layers:
            numbers += (KINDS.index(layer.kind), *layer[1:5])
        constants = [layer.constant for layer in layers]
        forms = FORMS[form] & ~FORMS["gram"] if adapted else FORMS[form]
        self.arguments = (numbers, constants, list(alpha), steps, *losses, forms, psd, adapt)
        self.adapt = adapt
        self._tape_sizes: dict[Any, int] = {}
        # For each kind of operand and parameter, its place among those that follow each other.
        place = iter(range(sum([mask.bit_count() for mask in present])))
        self.places = [
            [next(place) if mask & (1 << bit) else None for mask in present]
            for bit in range(len(GROUPS))
        ]

    def groups(self, flat: Sequence[Any]) -> list[list[Any]]:
        """Operands that follow each other, as one list per kind with None for what is absent."""
        return [[None if k is None else flat[k] for k in places] for places in self.places]

    def tape_size(self, data: Sequence[Any]) -> int:
        """How many numbers per task the derivative needs."""
        x_s, _, x_q, y_q = data[-4:]
        key = (x_s.dtype, x_s.shape[1], None if x_q is None else x_q.shape[1], y_q is None)
        size = self._tape_sizes.get(key)
        if size is None:
            size = torch.ops.fastkfo.inner_loop_tape.default(*data, *self.arguments)
            self._tape_sizes[key] = size
        return size

    def masks(self, wants: Sequence[bool]) -> list[int]:
        """What is wanted of every parameter, as bits."""
        return [
            sum([1 << bit for bit, k in enumerate(own) if k is not None and wants[k]])
            for own in zip(*self.places, strict=True)
        ]


def flattened(groups: Sequence[Sequence[Tensor | None]]) -> tuple[list[int], list[Tensor]]:
    """Which operands there are, as bits of every parameter; and these, one after the other."""
    present = [0] * len(groups[0])
    flat = []
    for bit, group in enumerate(groups):
        for i, x in enumerate(group):
            if x is not None:
                present[i] |= 1 << bit
                flat.append(x)
    return present, flat
