"""MAML: an initialisation from which a few gradient steps learn a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastkfo.algorithms.base_learner import BaseLearner, check_module
from fastkfo.algorithms.inner_options import InnerOptions
from fastkfo.functional.checks import finite
from fastkfo.inner_loop.learner import BatchedLearner, check_own_adapt
from fastkfo.inner_loop.step import Rule
from fastkfo.optim.differentiate import gradients, own_gradients
from fastkfo.optim.fused import updated_parameters
from fastkfo.optim.inner import InnerOptimizer, PerStepLR
from fastkfo.optim.inner.update import check_lr, inner_update
from fastkfo.utils import ParameterSlots, clone_module


def maml_update(
    model: nn.Module, lr: float | Tensor, grads: Sequence[Tensor | None] | None = None
) -> nn.Module:
    """Take one differentiable gradient step on every parameter: `p ← p − lr · g`.

    Args:
        model: the module to update, in place; its old parameters are not written to.
        lr: the learning rate.
        grads: one gradient or None per parameter; by default the parameters' `.grad`.

    Returns:
        The module.

    Raises:
        TypeError: `lr` is no number or tensor, or dtypes do not match.
        ValueError: `lr` is not finite, there are too few or too many gradients, one has the wrong
            shape, or there is none at all.
    """
    finite("lr", lr)
    slots = ParameterSlots(model)
    grads = own_gradients(slots.params) if grads is None else list(grads)
    if len(grads) != len(slots.params):
        raise ValueError(
            f"grads: expected {len(slots.params)}, one per parameter, got {len(grads)}"
        )
    slots.put(updated_parameters(None, slots.params, grads, lr))
    return model


class MAML(InnerOptions, BaseLearner):
    """Learns the initial parameters of a model by differentiating through adaptation.

    Args:
        model: the model; its parameters are those of the learner.
        lr: the learning rate of `adapt`: a number, a tensor or a `fastkfo.optim.PerStepLR`.
        first_order: whether gradients are treated as constants of the meta-gradient.
        allow_unused: whether parameters that a loss does not use are left as they are; by default
            as `allow_nograd`.
        allow_nograd: whether parameters that require no gradient are left as they are.
        inner_optimizer: takes the steps in place of plain SGD: one of `fastkfo.optim.inner`. Its
            state starts anew with this learner; a clone goes on with its learner's.
        clip_grad_norm: the largest norm of a task's gradients, over all parameters.
        clip_grad_value: the largest absolute value of a gradient's numbers.

    Raises:
        TypeError: `model` is no module or is compiled, `lr` is of none of its types, or one of the
            last three is of the wrong type.
        ValueError: `lr` is not finite or made for another model, or a value to clip at is not
            positive, or there are two.

    docs/inner_optimizers.md has the formulas of the last three.

    Source: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
    Networks", ICML 2017. The interface is learn2learn's.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor | PerStepLR,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
        *,
        inner_optimizer: InnerOptimizer | None = None,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
    ) -> None:
        check_module("model", model)
        check_lr(lr, model)
        inner_update(inner_optimizer, clip_grad_norm, clip_grad_value).check_module(model)
        super().__init__(model)
        self.lr = lr
        self._set_options(inner_optimizer, clip_grad_norm, clip_grad_value)
        self.first_order = first_order
        self.allow_nograd = allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """Take one gradient step on a loss. An option left None is the learner's.

        Args:
            loss: a scalar computed with this learner.
            first_order: whether the gradients are treated as constants.
            allow_unused: whether parameters that the loss does not use are left as they are.
            allow_nograd: whether parameters that require no gradient are left as they are.

        Raises:
            TypeError: `loss` is no tensor.
            ValueError: `loss` is not a scalar or has no graph, or `lr` has no rate for this step.
                The learner is as it was.
            RuntimeError: autograd's own, with the option that would help.
        """
        second_order = not (self.first_order if first_order is None else first_order)
        slots = ParameterSlots(self.module)
        lr = self._rate(len(slots.params))
        grads = gradients(
            loss,
            slots.params,
            create_graph=second_order,
            retain_graph=second_order,
            allow_unused=self.allow_unused if allow_unused is None else allow_unused,
            allow_nograd=self.allow_nograd if allow_nograd is None else allow_nograd,
        )
        update = self._inner_update()
        new, state = update.step(None, slots.params, grads, lr, self._inner_state)
        slots.put(new)
        vars(self)["_inner_state"] = state  # no module, no tensor: torch need not look

    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        *,
        tasks: int | None = None,
        buffers: str = "shared",
    ) -> Any:
        """A learner for one task, or for T at once, whose parameters lead back to this one's.

        Args:
            first_order: the clone's option; None takes this learner's.
            allow_unused: likewise.
            allow_nograd: likewise.
            tasks: T; then the clone is a `BatchedLearner`, with a task axis in front of everything.
            buffers: for a batched clone, what becomes of batch norms' running statistics: "shared",
                "frozen" or "per_task".

        Returns:
            The clone, a MAML or a BatchedLearner.

        Raises:
            TypeError: the model has been compiled, or `tasks` is no int.
            ValueError: `tasks` is below 1.
        """
        if tasks is not None:
            check_own_adapt(self)
            return BatchedLearner(
                self.rule(first_order, allow_unused, allow_nograd), tasks, buffers
            )
        return MAML._for_task(
            clone_module(self.module),
            lr=self.lr,
            first_order=self.first_order if first_order is None else first_order,
            allow_unused=self.allow_unused if allow_unused is None else allow_unused,
            allow_nograd=self.allow_nograd if allow_nograd is None else allow_nograd,
            **self._inner_options(),
        )

    def rule(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> Rule:
        """How clones adapt, in the form that batched learners and `InnerLoop` take."""
        return Rule(
            module=self.module,
            compute_update=None,
            lr=self._checked_lr(),
            first_order=self.first_order if first_order is None else first_order,
            allow_unused=self.allow_unused if allow_unused is None else allow_unused,
            allow_nograd=self.allow_nograd if allow_nograd is None else allow_nograd,
            inner=self._inner_update(),
            state=self._inner_state,
        )
