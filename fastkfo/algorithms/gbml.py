"""Gradient-based meta-learning with a learned transform of the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastkfo.algorithms.base_learner import check_module
from fastkfo.algorithms.inner_options import InnerOptions
from fastkfo.inner_loop.learner import BatchedLearner, check_own_adapt
from fastkfo.inner_loop.step import Rule
from fastkfo.optim.clone_cache import GramCache
from fastkfo.optim.differentiate import gradients, through_last_update
from fastkfo.optim.fused import updated_parameters
from fastkfo.optim.inner import InnerOptimizer, OptimizerState, PerStepLR
from fastkfo.optim.inner.update import InnerUpdate, check_adaptable, check_lr, inner_update
from fastkfo.optim.parameter_update import ParameterUpdate
from fastkfo.optim.update_rules import DifferentiableSGD
from fastkfo.utils import ParameterSlots, clone_module

Updated = tuple[list[Tensor], OptimizerState]


class GBML(InnerOptions, nn.Module):
    """Learns initial parameters θ and a transform φ of the gradients that adapt them.

    One call of `adapt` takes `θ ← θ − lr · transform_φ(∇θ loss)`. With `adapt_transform`, every
    call but a clone's first takes a gradient step on φ before, through the last update of θ.

    Args:
        module: the model.
        transform: called with each parameter; returns a module that transforms its gradient, or
            None for the plain gradient.
        lr: the learning rate of `adapt`; a number, a tensor or a `fastkfo.optim.PerStepLR`. A
            Parameter is learned too.
        adapt_transform: whether φ is adapted as well.
        first_order: whether gradients are treated as constants of the meta-gradient; φ is learned
            all the same.
        allow_unused: whether parameters that a loss does not use are left as they are.
        allow_nograd: whether parameters that require no gradient are left as they are.
        inner_optimizer: takes the steps in place of plain SGD, on transformed gradients: one of
            `fastkfo.optim.inner`. Its state starts anew with this learner; a clone goes on with its
            learner's. Steps of φ are plain.
        clip_grad_norm: the largest norm of a task's gradients, over all parameters, before the
            transform.
        clip_grad_value: the largest absolute value of a gradient's numbers, before the transform.
        compute_update: (keyword only, instead of the one made from `transform`) a module called
            like a `ParameterUpdate`.

    Raises:
        TypeError: `module` is no module or is compiled, `lr` is of none of its types, or an option
            is of the wrong type.
        ValueError: `lr` is not finite or made for another model, `transform` returned neither a
            module nor None, a value to clip at is not positive or has nothing to clip, there are
            two, or `adapt_transform` has no rate.

    docs/inner_optimizers.md has the formulas of inner optimizers and clipping.

    Source: Arnold, Iqbal, Sha, "When MAML Can Adapt Fast and How to Assist When It Cannot",
    AISTATS 2021. The interface is learn2learn's.
    """

    _model_at = "its `module`"  # what fastkfo.nn tells who passes the learner instead

    def __init__(
        self,
        module: nn.Module,
        transform: Callable[[Tensor], nn.Module | None],
        lr: float | Tensor | PerStepLR = 1.0,
        adapt_transform: bool = False,
        first_order: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
        *,
        inner_optimizer: InnerOptimizer | None = None,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        **kwargs: Any,
    ) -> None:
        check_module("module", module)
        check_lr(lr, module)
        inner_update(inner_optimizer, clip_grad_norm, clip_grad_value).check_module(module)
        compute_update = kwargs.pop("compute_update", None)
        if kwargs:
            raise TypeError(f"GBML: unexpected keyword arguments {sorted(kwargs)}")
        check_adaptable(lr, adapt_transform)
        super().__init__()
        self.module = module
        self.transform = transform
        self.adapt_transform = adapt_transform
        self.lr = lr
        self.first_order = first_order
        self.allow_unused = allow_unused
        self.allow_nograd = allow_nograd
        if compute_update is None:
            compute_update = ParameterUpdate(module.parameters(), transform)
        self.compute_update = compute_update
        self._set_options(inner_optimizer, clip_grad_norm, clip_grad_value)
        self._inner_update()  # raises if there is nothing to clip
        # A rule with one rate; what learn2learn's users may look for.
        self.diff_sgd = None if isinstance(lr, PerStepLR) else DifferentiableSGD(lr=lr)
        # Whether θ carries an update by φ that φ can be adapted through.
        self._params_updated = False
        # LᵀL, computed once; for clones alone, since they end with their task.
        self._gram_cache: GramCache | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.module(*args, **kwargs)

    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        adapt_transform: bool | None = None,
        *,
        tasks: int | None = None,
        buffers: str = "shared",
    ) -> Any:
        """A learner for one task, or for T at once, whose parameters lead back to this one's.

        Args:
            first_order: the clone's option; None takes this learner's.
            allow_unused: likewise.
            allow_nograd: likewise.
            adapt_transform: likewise.
            tasks: T; then the clone is a `BatchedLearner`, with a task axis in front of everything.
            buffers: for a batched clone, what becomes of batch norms' running statistics: "shared",
                "frozen" or "per_task".

        Returns:
            The clone, a GBML or a BatchedLearner. It has not been adapted, whatever this learner
            has.

        Raises:
            TypeError: the model has been compiled, or `tasks` is no int.
            ValueError: `tasks` is below 1, or this learner's step cannot be batched.

        A clone keeps `LᵀL` of its factors from step to step. It notices when they are changed in
        place, but not through `.data`, which leaves no trace. Like every tensor with a graph, a
        clone can be pickled but not deep-copied, until `detach_module` has cut it off.
        """
        if tasks is not None:
            check_own_adapt(self)
            rule = self.rule(first_order, allow_unused, allow_nograd, adapt_transform)
            return BatchedLearner(rule, tasks, buffers)
        adapts = _default(adapt_transform, self.adapt_transform)
        check_adaptable(self.lr, adapts)
        clone = GBML.__new__(GBML)
        nn.Module.__init__(clone)
        # Runs once per task: nn.Module's own attribute writes would cost more than the clones.
        vars(clone).update(
            transform=self.transform,
            adapt_transform=adapts,
            first_order=_default(first_order, self.first_order),
            allow_unused=_default(allow_unused, self.allow_unused),
            allow_nograd=_default(allow_nograd, self.allow_nograd),
            **self._inner_options(),
            _params_updated=False,
            _gram_cache=GramCache(),
        )
        lr, own = self.lr, clone._modules
        own["module"] = clone_module(self.module)
        if isinstance(lr, PerStepLR):
            own["lr"] = lr
            vars(clone)["diff_sgd"] = None
        elif isinstance(lr, nn.Parameter):
            clone.lr = lr
        else:
            vars(clone)["lr"] = lr
        own["compute_update"] = clone_module(self.compute_update)
        if not isinstance(lr, PerStepLR):
            known = self.diff_sgd is not None and self.diff_sgd.lr is lr
            own["diff_sgd"] = self.diff_sgd if known else DifferentiableSGD(lr)
        return clone

    def rule(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        adapt_transform: bool | None = None,
    ) -> Rule:
        """How clones adapt, in the form that batched learners and `InnerLoop` take."""
        adapts = _default(adapt_transform, self.adapt_transform)
        check_adaptable(self.lr, adapts)
        return Rule(
            module=self.module,
            compute_update=self.compute_update,
            lr=self._checked_lr(),
            first_order=_default(first_order, self.first_order),
            adapt_transform=adapts,
            allow_unused=_default(allow_unused, self.allow_unused),
            allow_nograd=_default(allow_nograd, self.allow_nograd),
            inner=self._inner_update(),
            state=self._inner_state,
        )

    def _inner_update(self) -> InnerUpdate:
        found = super()._inner_update()
        if found.clips and type(self.compute_update) is not ParameterUpdate:
            name = "clip_grad_norm" if found.clip_norm is not None else "clip_grad_value"
            kind = type(self.compute_update).__name__
            raise ValueError(
                f"{name}: expected None with a compute_update that is a {kind}, which computes "
                "gradients by itself"
            )
        return found

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_nograd: bool | None = None,
        allow_unused: bool | None = None,
    ) -> None:
        """Take one step on a loss. An option left None is the learner's.

        Args:
            loss: a scalar computed with this learner.
            first_order: whether the gradients are treated as constants.
            allow_nograd: whether parameters that require no gradient are left as they are.
            allow_unused: whether parameters that the loss does not use are left as they are.

        Raises:
            TypeError: `loss` is no tensor, or a transform's dtype is not its parameter's.
            ValueError: `loss` is not a scalar or has no graph, a transform returned the wrong
                shape, or `lr` has no rate for this step. The learner is as it was before the call.
            RuntimeError: autograd's own, with the option that would help.
        """
        second_order = not _default(first_order, self.first_order)
        allow_unused = _default(allow_unused, self.allow_unused)
        allow_nograd = _default(allow_nograd, self.allow_nograd)
        slots = ParameterSlots(self.module)
        self._rate(len(slots.params))  # raises if there is none
        phi = ParameterSlots(self.compute_update) if self._adapts_transform() else None
        if type(self.compute_update) is ParameterUpdate:
            step = self._fused_step
        else:
            step = self._general_step
        step(slots, phi, loss, second_order, allow_unused, allow_nograd)
        self._params_updated = True

    def _adapts_transform(self) -> bool:
        return self.adapt_transform and self._params_updated

    def _fused_step(
        self,
        slots: ParameterSlots,
        phi: ParameterSlots | None,
        loss: Tensor,
        second_order: bool,
        allow_unused: bool,
        allow_nograd: bool,
    ) -> None:
        count = len(slots.params)
        learned = [p for p in phi.params if p.requires_grad] if phi is not None else []
        # One backward pass gives the gradients in θ and, through its last update, those in φ.
        inputs = [*slots.params, *learned] if second_order else slots.params
        found = gradients(loss, inputs, second_order, second_order, allow_unused, allow_nograd)
        grads, phi_grads = found[:count], found[count:]
        if learned and not second_order:
            phi_grads = through_last_update(slots.params, learned, grads, allow_unused)

        def updated() -> Updated:
            transforms = self.compute_update.transforms()
            # Under a transform of torch.func tensors come and go, and tell less of themselves.
            cache = None if torch._C._are_functorch_transforms_active() else self._gram_cache
            return self._inner_update().step(
                transforms, slots.params, grads, self._rate(count), self._inner_state, cache
            )

        self._commit(slots, phi, learned, phi_grads, updated)

    def _general_step(
        self,
        slots: ParameterSlots,
        phi: ParameterSlots | None,
        loss: Tensor,
        second_order: bool,
        allow_unused: bool,
        allow_nograd: bool,
    ) -> None:
        """A step through a `compute_update` of the user's own, by its interface alone."""
        learned = [p for p in phi.params if p.requires_grad] if phi is not None else []
        phi_grads: list[Tensor | None] = []
        if learned and second_order:
            phi_grads = gradients(loss, learned, True, True, allow_unused, False)
        elif learned:
            grads = gradients(loss, slots.params, False, True, allow_unused, allow_nograd)
            phi_grads = through_last_update(slots.params, learned, grads, allow_unused)

        def updated() -> Updated:
            updates = self.compute_update(
                loss,
                slots.params,
                create_graph=second_order,
                retain_graph=second_order,
                allow_unused=allow_unused,
                allow_nograd=allow_nograd,
            )
            return self._inner_update().step(
                None, slots.params, list(updates), self._rate(len(slots.params)), self._inner_state
            )

        self._commit(slots, phi, learned, phi_grads, updated)

    def _commit(
        self,
        slots: ParameterSlots,
        phi: ParameterSlots | None,
        learned: list[Tensor],
        phi_grads: list[Tensor | None],
        updated: Callable[[], Updated],
    ) -> None:
        """Update φ, then θ and the optimizer's state by the new φ; all or, on an error, none."""
        if phi is None or not learned:
            found, state = updated()
        else:
            old = phi.params
            moved = updated_parameters(None, learned, phi_grads, self._rate(len(slots.params)))
            new = dict(zip(map(id, learned), moved, strict=True))
            phi.put([new.get(id(p), p) for p in old])
            try:
                found, state = updated()
            except BaseException:
                phi.put(old)
                raise
        slots.put(found)
        vars(self)["_inner_state"] = state  # no module, no tensor: torch need not look


def _default(value: bool | None, otherwise: bool) -> bool:
    return otherwise if value is None else value
