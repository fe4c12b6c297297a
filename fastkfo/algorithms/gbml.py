"""Gradient-based meta-learning with a learned transform of the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastkfo.algorithms.base_learner import check_module
from fastkfo.functional.checks import finite
from fastkfo.optim.differentiate import gradients
from fastkfo.optim.fused import GramCache, updated_parameters
from fastkfo.optim.parameter_update import ParameterUpdate
from fastkfo.optim.update_rules import DifferentiableSGD
from fastkfo.utils import clone_module, replace_parameters


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
        super().__init__()
        self.module = module
        self.transform = transform
        self.adapt_transform = adapt_transform
        self.lr = lr
        self.first_order = first_order
        self.allow_unused = allow_unused
        self.allow_nograd = allow_nograd
        compute_update = kwargs.pop("compute_update", None)
        if kwargs:
            raise TypeError(f"GBML: unexpected keyword arguments {sorted(kwargs)}")
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
    ) -> GBML:
        """A learner for one task, whose parameters and transform lead back to this one's.

        Args:
            first_order: the clone's option; None takes this learner's.
            allow_unused: likewise.
            allow_nograd: likewise.
            adapt_transform: likewise.

        Returns:
            The clone. It has not been adapted, whatever this learner has.

        Raises:
            TypeError: the model has been compiled.
        """
        clone = GBML(
            module=clone_module(self.module),
            transform=self.transform,
            lr=self.lr,
            adapt_transform=_default(adapt_transform, self.adapt_transform),
            first_order=_default(first_order, self.first_order),
            allow_unused=_default(allow_unused, self.allow_unused),
            allow_nograd=_default(allow_nograd, self.allow_nograd),
            compute_update=clone_module(self.compute_update),
        )
        clone._gram_cache = GramCache()
        return clone

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
        params = list(self.module.parameters())
        phi: list[Tensor] = []
        if self.adapt_transform and self._params_updated:
            phi = [p for p in self.compute_update.parameters() if p.requires_grad]

        if type(self.compute_update) is not ParameterUpdate:
            self._adapt_with(params, phi, loss, second_order, allow_unused, allow_nograd)
            return
        # One backward pass gives the gradients in θ and, through its last update, those in φ.
        together = phi if second_order else []
        grads = gradients(
            loss, [*params, *together], second_order, second_order, allow_unused, allow_nograd
        )
        grads, phi_grads = grads[: len(params)], grads[len(params) :]
        if phi and not second_order:
            phi_grads = _through_last_update(params, phi, grads, allow_unused)
        self._step(params, phi, grads, phi_grads)

    def _step(
        self,
        params: list[Tensor],
        phi: list[Tensor],
        grads: list[Tensor | None],
        phi_grads: list[Tensor | None],
    ) -> None:
        """Update φ, then θ with the new φ; both or, on an error, neither."""
        new_phi = updated_parameters(None, phi, phi_grads, self.lr) if phi else {}
        replace_parameters(self.compute_update, new_phi)
        try:
            new = updated_parameters(
                self.compute_update.transforms(), params, grads, self.lr, self._gram_cache
            )
        except Exception:
            old = {id(new_phi[id(p)]): p for p in phi if id(p) in new_phi}
            replace_parameters(self.compute_update, old)
            raise
        replace_parameters(self.module, new)
        self._params_updated = True

    def _adapt_with(
        self,
        params: list[Tensor],
        phi: list[Tensor],
        loss: Tensor,
        second_order: bool,
        allow_unused: bool,
        allow_nograd: bool,
    ) -> None:
        """Adapt through a `compute_update` of the user's own, by its interface alone."""
        new_phi: dict[int, Tensor] = {}
        if phi:
            if second_order:
                phi_grads = gradients(loss, phi, True, True, allow_unused, False)
            else:
                grads = gradients(loss, params, False, True, allow_unused, allow_nograd)
                phi_grads = _through_last_update(params, phi, grads, allow_unused)
            new_phi = updated_parameters(None, phi, phi_grads, self.lr)
        replace_parameters(self.compute_update, new_phi)
        try:
            updates = self.compute_update(
                loss,
                params,
                create_graph=second_order,
                retain_graph=second_order,
                allow_unused=allow_unused,
                allow_nograd=allow_nograd,
            )
            new = updated_parameters(None, params, list(updates), self.lr)
        except Exception:
            old = {id(new_phi[id(p)]): p for p in phi if id(p) in new_phi}
            replace_parameters(self.compute_update, old)
            raise
        replace_parameters(self.module, new)
        self._params_updated = True


def _default(value: bool | None, otherwise: bool) -> bool:
    return otherwise if value is None else value


def _through_last_update(
    params: list[Tensor], phi: list[Tensor], grads: list[Tensor | None], allow_unused: bool
) -> list[Tensor | None]:
    """The gradients in φ of a loss whose gradients in the updated θ are constants.

    First order: the graph of the loss is not kept, that of the update is, so that φ's own updates
    stay differentiable in φ.
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
