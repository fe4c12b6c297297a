"""Meta-SGD: MAML with a learned learning rate for every number of every parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkfo.algorithms.base_learner import BaseLearner, check_module
from fastkfo.functional.checks import finite
from fastkfo.inner_loop.learner import BatchedLearner, check_own_adapt
from fastkfo.inner_loop.step import Rule
from fastkfo.optim.differentiate import gradients, own_gradients
from fastkfo.optim.fused import updated_parameters
from fastkfo.utils import ParameterSlots, clone_module, clone_parameters


def meta_sgd_update(
    model: nn.Module,
    lrs: Sequence[Tensor] | None = None,
    grads: Sequence[Tensor | None] | None = None,
) -> nn.Module:
    """Take one differentiable step with a learning rate per element: `p ← p − lr ∘ g`.

    Args:
        model: the module to update, in place; its old parameters are not written to. Tied
            parameters stay tied.
        lrs: one tensor of its parameter's shape, or a scalar, per parameter; by default the
            parameters' `._lr`.
        grads: one gradient or None per parameter; by default the parameters' `.grad`.

    Returns:
        The module.

    Raises:
        TypeError: dtypes do not match.
        ValueError: lengths or shapes do not match, or a default is asked for that is not there.
    """
    slots = ParameterSlots(model)
    params = slots.params
    grads = own_gradients(params) if grads is None else list(grads)
    rates: list[Any] = [getattr(p, "_lr", None) for p in params] if lrs is None else list(lrs)
    for name, values in (("lrs", rates), ("grads", grads)):
        if len(values) != len(params):
            raise ValueError(
                f"{name}: expected {len(params)}, one per parameter, got {len(values)}"
            )
    for i, (lr, grad) in enumerate(zip(rates, grads, strict=True)):
        if lr is None and grad is not None:
            raise ValueError(f"lrs: expected a tensor for parameter {i}, got None")
    slots.put(updated_parameters(None, params, grads, rates))
    return model


class MetaSGD(BaseLearner):
    """Learns the initial parameters of a model and a learning rate for each of their elements.

    Args:
        model: the model; its parameters are those of the learner.
        lr: the initial learning rates.
        first_order: whether gradients are treated as constants of the meta-gradient.
        lrs: the learning rates, one tensor per parameter; by default made from `lr`.

    Raises:
        TypeError: `model` is no module or is compiled, or `lr` no number.
        ValueError: `lr` is not finite, or there is not one of `lrs` per parameter.

    Source: Li, Zhou, Chen, Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017.
    The interface is learn2learn's.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        first_order: bool = False,
        lrs: nn.ParameterList | list[Tensor] | None = None,
    ) -> None:
        check_module("model", model)
        finite("lr", lr)
        super().__init__(model)
        params = list(model.parameters())
        if lrs is None:
            lrs = nn.ParameterList([nn.Parameter(torch.ones_like(p) * lr) for p in params])
        if len(lrs) != len(params):
            raise ValueError(f"lrs: expected {len(params)}, one per parameter, got {len(lrs)}")
        self.lrs = lrs
        self.first_order = first_order

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """Take one step on a loss.

        Args:
            loss: a scalar computed with this learner.
            first_order: whether the gradients are treated as constants; None takes the learner's.

        Raises:
            TypeError: `loss` is no tensor.
            ValueError: `loss` is not a scalar or has no graph. The learner is as it was.
            RuntimeError: autograd's own.
        """
        second_order = not (self.first_order if first_order is None else first_order)
        slots = ParameterSlots(self.module)
        params = slots.params
        grads = gradients(
            loss,
            params,
            create_graph=second_order,
            retain_graph=second_order,
            allow_unused=False,
            allow_nograd=False,
        )
        lrs = list(self.lrs)
        slots.put(updated_parameters(None, params, grads, lrs))

    def clone(self, *, tasks: int | None = None, buffers: str = "shared") -> Any:
        """A learner for one task, or for T at once, whose tensors lead back to this one's.

        Args:
            tasks: T; then the clone is a `BatchedLearner`, with a task axis in front of everything.
            buffers: for a batched clone, what becomes of batch norms' running statistics: "shared",
                "frozen" or "per_task".

        Returns:
            The clone, a MetaSGD or a BatchedLearner.

        Raises:
            TypeError: the model has been compiled, or `tasks` is no int.
            ValueError: `tasks` is below 1.
        """
        if tasks is not None:
            check_own_adapt(self)
            return BatchedLearner(self.rule(), tasks, buffers)
        return MetaSGD._for_task(
            clone_module(self.module), lrs=clone_parameters(self.lrs), first_order=self.first_order
        )

    def rule(self, first_order: bool | None = None) -> Rule:
        """How clones adapt, in the form that batched learners and `InnerLoop` take."""
        return Rule(
            module=self.module,
            compute_update=None,
            lr=list(self.lrs),
            first_order=self.first_order if first_order is None else first_order,
        )
