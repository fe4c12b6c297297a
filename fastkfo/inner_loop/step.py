"""What a learner does with its tasks' gradients: one step of the parameters, one of the transform.

θ are the learner's parameters, `[T, ...]`; φ the transform's, shared or `[T, ...]`; g the gradients
in θ, `[T, ...]` or None; lr the learning rate, one or one per parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkfo.inner_loop.containment import Contained
from fastkfo.inner_loop.model import shell_of
from fastkfo.optim.clone_cache import GramCache
from fastkfo.optim.fused import TaskAxis, updated_parameters
from fastkfo.optim.parameter_update import ParameterUpdate
from fastkfo.utils import ParameterSlots

Grads = Sequence["Tensor | None"]


class Rule(NamedTuple):
    """How a learner adapts.

    Attributes:
        module: the model.
        compute_update: the transforms of its gradients, or None.
        lr: a number, a tensor, or one tensor per parameter.
        first_order: whether gradients are constants of the meta-gradient.
        adapt_transform: whether the transforms take steps, too.
        allow_unused: whether parameters that a loss does not use are left as they are.
        allow_nograd: whether parameters that require no gradient are left as they are.
    """

    module: nn.Module
    compute_update: nn.Module | None
    lr: Any
    first_order: bool
    adapt_transform: bool = False
    allow_unused: bool = False
    allow_nograd: bool = False

    @property
    def rates(self) -> list[Tensor]:
        """The learning rates that are tensors."""
        if isinstance(self.lr, Tensor):
            return [self.lr]
        return list(self.lr) if isinstance(self.lr, (list, tuple, nn.ParameterList)) else []

    def why_not_batched(self) -> str | None:
        """Why its step cannot be taken for several tasks at once, or None if it can."""
        if self.compute_update is None or type(self.compute_update) is ParameterUpdate:
            return None
        kind = type(self.compute_update).__name__
        return f"compute_update is a {kind}, whose step differentiates a loss by itself"


class InnerStep:
    """The steps of one clone. Holds a copy of the transforms; their parameters are arguments.

    Args:
        rule: of the learner.
        tasks: T.
    """

    def __init__(self, rule: Rule, tasks: int) -> None:
        self.tasks, self.lr = tasks, rule.lr
        self.own = rule.adapt_transform
        self.axis = TaskAxis(tasks, self.own)
        self.update: Any = None
        self.slots: ParameterSlots | None = None
        if rule.compute_update is not None:
            self.update = shell_of(rule.compute_update)
            self.slots = ParameterSlots(self.update)
            self.transforms = self.update.transforms()
        self.squares = GramCache()

    def forget(self) -> None:
        """Let go of what was computed from φ."""
        self.squares = GramCache()

    def theta(self, theta: list[Tensor], phi: list[Tensor], rates: list[Tensor], g: Grads) -> Any:
        """`θ − lr · U_φ(g)`; the same tensor where g is None."""
        shared = rates if self.own else [*rates, *phi]
        if torch.is_grad_enabled() and any([x.requires_grad for x in shared]):
            contained = Contained(self.tasks)
            new = self._theta(theta, phi, rates, contained.enter(g))
            live = [k for k, x in enumerate(g) if x is not None]
            for k, x in zip(live, contained.leave([new[k] for k in live]), strict=True):
                new[k] = x
            return new
        return self._theta(theta, phi, rates, g)

    def _theta(
        self, theta: list[Tensor], phi: list[Tensor], rates: list[Tensor], g: Grads
    ) -> list[Tensor]:
        lr = self._rate(rates)
        if self.slots is None:
            return updated_parameters(None, theta, g, lr)
        self.slots.put(phi)
        return updated_parameters(self.transforms, theta, g, lr, self.squares, self.axis)

    def _rate(self, rates: list[Tensor]) -> Any:
        if not rates:
            return self.lr
        return rates[0] if isinstance(self.lr, Tensor) else rates

    def phi(
        self,
        phi: list[Tensor],
        rates: list[Tensor],
        last: Grads,
        g: Grads,
        allow_unused: bool,
    ) -> list[Tensor]:
        """`φ + lr² (∂U_φ(g_last)/∂φ)ᵀ g`: a step on the loss through the last update of θ alone.

        Args:
            phi: φ before the step, `[T, ...]`.
            rates: the learning rates that are tensors.
            last: the gradients of the update before.
            g: those of the update to come.
            allow_unused: whether parameters in φ that the last update did not use are left.

        Returns:
            φ after it; differentiable in everything that is.
        """
        with torch.enable_grad():
            live = [k for k, p in enumerate(phi) if p.requires_grad]
            if not live:
                return phi
            zeros = [torch.zeros_like(x) if x is not None else x for x in last]
            zeros = [x if x is not None else phi[0].new_zeros(()) for x in zeros]
            moved = self._theta(zeros, phi, rates, last)  # type: ignore[arg-type]
            through = [
                (moved[k], cotangent)
                for k, (x, cotangent) in enumerate(zip(last, g, strict=True))
                if x is not None and cotangent is not None and moved[k].requires_grad
            ]
            grads = torch.autograd.grad(
                [m for m, _ in through],
                [phi[k] for k in live],
                [c for _, c in through],
                create_graph=True,
                allow_unused=allow_unused,
            )
            steps = updated_parameters(None, [phi[k] for k in live], grads, self._rate(rates))
        new = list(phi)
        for k, x in zip(live, steps, strict=True):
            new[k] = x
        return new
