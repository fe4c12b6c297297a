"""Gradient-based meta-learning with a learned transform of the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastkfo.algorithms.base_learner import check_module
from fastkfo.functional.checks import finite
from fastkfo.inner_loop.learner import BatchedLearner, check_own_adapt
from fastkfo.inner_loop.step import Rule
from fastkfo.optim.clone_cache import GramCache
from fastkfo.optim.differentiate import gradients
from fastkfo.optim.fused import updated_parameters
from fastkfo.optim.parameter_update import ParameterUpdate
from fastkfo.optim.update_rules import DifferentiableSGD
from fastkfo.utils import ParameterSlots, clone_module


class GBML(nn.Module):
    """Learns initial parameters θ and a transform φ of the gradients that adapt them.

    One call of `adapt` takes `θ ← θ − lr · transform_φ(∇θ loss)`. With `adapt_transform`, every
    call but a clone's first takes a gradient step on φ before, through the last update of θ.

    Args:
        module: the model.
        transform: called with each parameter; returns a module that transforms its gradient, or
            None for the plain gradient.
        lr: the learning rate of `adapt`; a number or a tensor. A Parameter is learned too.
        adapt_transform: whether φ is adapted as well.
        first_order: whether gradients are treated as constants of the meta-gradient; φ is learned
            all the same.
        allow_unused: whether parameters that a loss does not use are left as they are.
        allow_nograd: whether parameters that require no gradient are left as they are.
        compute_update: (keyword only, instead of the one made from `transform`) a module called
            like a `ParameterUpdate`.

    Raises:
        TypeError: `module` is no module or is compiled, or `lr` is no number or tensor.
        ValueError: `lr` is not finite, or `transform` returned neither a module nor None.

    Source: Arnold, Iqbal, Sha, "When MAML Can Adapt Fast and How to Assist When It Cannot",
    AISTATS 2021. The interface is learn2learn's.
    """

    def __init__(
        self,
        module: nn.Module,
        transform: Callable[[Tensor], nn.Module | None],
        lr: float | Tensor = 1.0,
        adapt_transform: bool = False,
        first_order: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
        **kwargs: Any,
    ) -> None:
        check_module("module", module)
        finite("lr", lr)
        compute_update = kwargs.pop("compute_update", None)
        if kwargs:
            raise TypeError(f"GBML: unexpected keyword arguments {sorted(kwargs)}")
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
        self.diff_sgd = DifferentiableSGD(lr=lr)
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
        clone = GBML.__new__(GBML)
        nn.Module.__init__(clone)
        # Runs once per task: nn.Module's own attribute writes would cost more than the clones.
        vars(clone).update(
            transform=self.transform,
            adapt_transform=_default(adapt_transform, self.adapt_transform),
            first_order=_default(first_order, self.first_order),
            allow_unused=_default(allow_unused, self.allow_unused),
            allow_nograd=_default(allow_nograd, self.allow_nograd),
            _params_updated=False,
            _gram_cache=GramCache(),
        )
        lr = self.lr
        if isinstance(lr, nn.Parameter):
            clone.lr = lr
        else:
            vars(clone)["lr"] = lr
        clone._modules.update(
            module=clone_module(self.module),
            compute_update=clone_module(self.compute_update),
            diff_sgd=self.diff_sgd if self.diff_sgd.lr is lr else DifferentiableSGD(lr),
        )
        return clone

    def rule(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        adapt_transform: bool | None = None,
    ) -> Rule:
        """How clones adapt, in the form that batched learners and `InnerLoop` take."""
        return Rule(
            module=self.module,
            compute_update=self.compute_update,
            lr=self.lr,
            first_order=_default(first_order, self.first_order),
            adapt_transform=_default(adapt_transform, self.adapt_transform),
            allow_unused=_default(allow_unused, self.allow_unused),
            allow_nograd=_default(allow_nograd, self.allow_nograd),
        )

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
            ValueError: `loss` is not a scalar or has no graph, or a transform returned the wrong
                shape. The learner is as it was before the call.
            RuntimeError: autograd's own, with the option that would help.
        """
        second_order = not _default(first_order, self.first_order)
        allow_unused = _default(allow_unused, self.allow_unused)
        allow_nograd = _default(allow_nograd, self.allow_nograd)
        slots = ParameterSlots(self.module)
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
            phi_grads = _through_last_update(slots.params, learned, grads, allow_unused)

        def updated() -> list[Tensor]:
            transforms = self.compute_update.transforms()
            # Under a transform of torch.func tensors come and go, and tell less of themselves.
            cache = None if torch._C._are_functorch_transforms_active() else self._gram_cache
            return updated_parameters(transforms, slots.params, grads, self.lr, cache)

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
            phi_grads = _through_last_update(slots.params, learned, grads, allow_unused)

        def updated() -> list[Tensor]:
            updates = self.compute_update(
                loss,
                slots.params,
                create_graph=second_order,
                retain_graph=second_order,
                allow_unused=allow_unused,
                allow_nograd=allow_nograd,
            )
            return updated_parameters(None, slots.params, list(updates), self.lr)

        self._commit(slots, phi, learned, phi_grads, updated)

    def _commit(
        self,
        slots: ParameterSlots,
        phi: ParameterSlots | None,
        learned: list[Tensor],
        phi_grads: list[Tensor | None],
        updated: Callable[[], list[Tensor]],
    ) -> None:
        """Update φ, then θ by the new φ; both or, on an error, neither."""
        if phi is None or not learned:
            slots.put(updated())
            return
        old = phi.params
        new = dict(
            zip(
                map(id, learned), updated_parameters(None, learned, phi_grads, self.lr), strict=True
            )
        )
        phi.put([new.get(id(p), p) for p in old])
        try:
            slots.put(updated())
        except BaseException:
            phi.put(old)
            raise


def _default(value: bool | None, otherwise: bool) -> bool:
    return otherwise if value is None else value


def _through_last_update(
    params: list[Tensor], phi: list[Tensor], grads: list[Tensor | None], allow_unused: bool
) -> list[Tensor | None]:
    """The gradients in φ of a loss whose gradients in the updated θ are constants.

    First order: the graph of the loss is not kept, that of the update is, so that φ's own updates
    stay differentiable in φ.

    Args:
        params: θ, after their last update.
        phi: φ.
        grads: the gradients in θ, or None.
        allow_unused: whether a parameter in φ that the update does not use is given None.

    Returns:
        The gradients in φ.
    """
    live = [(p, g) for p, g in zip(params, grads, strict=True) if g is not None and p.requires_grad]
    return list(
        torch.autograd.grad(
            [p for p, _ in live],
            phi,
            [g for _, g in live],
            create_graph=True,
            allow_unused=allow_unused,
        )
    )
