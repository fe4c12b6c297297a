"""What a learner does with its tasks' gradients: one step of the parameters, one of the transform.

θ are the learner's parameters, `[T, ...]`; φ the transform's, shared or `[T, ...]`; g the gradients
in θ, `[T, ...]` or None; lr the learning rate, one or one per parameter. docs/inner_optimizers.md
has the step in full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkfo.inner_loop.containment import Contained
from fastkfo.inner_loop.model import shell_of
from fastkfo.optim.clone_cache import GramCache
from fastkfo.optim.fused import TaskAxis, transform_gradients, updated_parameters
from fastkfo.optim.inner import START, OptimizerState, PerStepLR
from fastkfo.optim.inner.update import InnerUpdate
from fastkfo.optim.parameter_update import ParameterUpdate
from fastkfo.utils import ParameterSlots

Grads = Sequence["Tensor | None"]


class Last(NamedTuple):
    """What the step before started from, beside θ and φ.

    Attributes:
        g: its gradients.
        state: the optimizer's state before it.
    """

    g: list[Tensor | None]
    state: OptimizerState


class Rule(NamedTuple):
    """How a learner adapts.

    Attributes:
        module: the model.
        compute_update: the transforms of its gradients, or None.
        lr: a number, a tensor, one tensor per parameter, or a `PerStepLR`.
        first_order: whether gradients are constants of the meta-gradient.
        adapt_transform: whether the transforms take steps, too.
        allow_unused: whether parameters that a loss does not use are left as they are.
        allow_nograd: whether parameters that require no gradient are left as they are.
        inner: what is done with gradients beside: clipping, an optimizer.
        state: the optimizer's, from steps that the learner has taken already; without T.
    """

    module: nn.Module
    compute_update: nn.Module | None
    lr: Any
    first_order: bool
    adapt_transform: bool = False
    allow_unused: bool = False
    allow_nograd: bool = False
    inner: InnerUpdate = InnerUpdate()
    state: OptimizerState = START

    @property
    def rates(self) -> list[Tensor]:
        """The learning rates that are tensors."""
        if isinstance(self.lr, Tensor):
            return [self.lr]
        if isinstance(self.lr, PerStepLR):
            return list(self.lr.rates)
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
        tasks: T, the number of tasks.
    """

    def __init__(self, rule: Rule, tasks: int) -> None:
        self.tasks, self.lr, self.inner = tasks, rule.lr, rule.inner
        self.own = rule.adapt_transform
        self.axis = TaskAxis(tasks, self.own)
        self.update: Any = None
        self.slots: ParameterSlots | None = None
        self.transforms: list[Any] | None = None
        if rule.compute_update is not None:
            self.update = shell_of(rule.compute_update)
            self.slots = ParameterSlots(self.update)
            self.transforms = self.update.transforms()
        self.squares = GramCache()

    def forget(self) -> None:
        """Let go of what was computed from φ."""
        self.squares = GramCache()

    def check(self, state: OptimizerState) -> None:
        """Raise ValueError unless there is a rate for the step from a state."""
        if isinstance(self.lr, PerStepLR):
            self.lr.check(state.step)

    def theta(
        self,
        theta: list[Tensor],
        phi: list[Tensor],
        rates: list[Tensor],
        g: Grads,
        state: OptimizerState = START,
    ) -> tuple[list[Tensor], OptimizerState]:
        """`θ − lr · d`, d the optimizer's direction of `U_φ(clip(g))`.

        Args:
            theta: θ.
            phi: φ.
            rates: the learning rates that are tensors.
            g: the gradients; where one is None, θ stays the same tensor.
            state: of the optimizer.

        Returns:
            θ and the state after the step.
        """
        lr = self._rate(rates, state.step)
        live = [k for k, x in enumerate(g) if x is not None]
        g = self.inner.clipped(g, self.tasks)
        if self.inner.at_once(self.transforms, lr):
            own = phi if self.own else []

            def whole(rows: list[Any]) -> list[Tensor]:
                return self._updated(theta, rows[len(g) :] or phi, lr, rows[: len(g)])

            shared = rates if self.own else [*rates, *phi]
            return self._contained(shared, [*g, *own], live, whole), state.next()
        directions, state = self.inner.directions(self._transformed(phi, g), state)

        def moved(rows: list[Any]) -> list[Tensor]:
            return updated_parameters(None, theta, rows, lr)

        return self._contained(rates, directions, live, moved), state

    def _updated(self, theta: list[Tensor], phi: list[Tensor], lr: Any, g: Grads) -> list[Tensor]:
        """`θ − lr · U_φ(g)`, in one call."""
        if self.slots is None:
            return updated_parameters(None, theta, g, lr)
        self.slots.put(phi)
        return updated_parameters(self.transforms, theta, g, lr, self.squares, self.axis)

    def _transformed(self, phi: list[Tensor], g: Grads) -> Grads:
        """`U_φ(g)`."""
        slots, transforms = self.slots, self.transforms
        if slots is None or transforms is None:
            return g

        def run(rows: list[Any]) -> list[Any]:
            slots.put(phi)
            return transform_gradients(transforms, rows, self.squares, self.axis)

        live = [k for k, t in enumerate(transforms) if t is not None and g[k] is not None]
        return self._contained([] if self.own else phi, g, live, run)

    def _contained(
        self,
        shared: Sequence[Tensor],
        rows: Grads,
        live: Sequence[int],
        run: Callable[[list[Any]], list[Any]],
    ) -> list[Any]:
        """What a function makes of rows `[T, ...]` and of tensors that all tasks share.

        Args:
            shared: the latter; bad rows stay out of their gradients.
            rows: what the function is called with.
            live: the results that are made of them; others are passed on.
            run: the function.

        Returns:
            Its results.
        """
        if not (torch.is_grad_enabled() and any([x.requires_grad for x in shared])):
            return run(list(rows))
        contained = Contained(self.tasks)
        new = run(contained.enter(rows))
        for k, x in zip(live, contained.leave([new[k] for k in live]), strict=True):
            new[k] = x
        return new

    def _rate(self, rates: list[Tensor], step: int) -> Any:
        if isinstance(self.lr, PerStepLR):
            return self.lr.at(step, rates)
        if not rates:
            return self.lr
        return rates[0] if isinstance(self.lr, Tensor) else rates

    def phi(
        self,
        phi: list[Tensor],
        rates: list[Tensor],
        last: Last,
        g: Grads,
        allow_unused: bool,
    ) -> list[Tensor]:
        """`φ + lr (∂(lr d)_last/∂φ)ᵀ g`: a step on the loss through the last update of θ alone.

        Args:
            phi: φ before the step, `[T, ...]`.
            rates: the learning rates that are tensors.
            last: what the update before was made of.
            g: the gradients of the update to come.
            allow_unused: whether parameters in φ that the last update did not use are left.

        Returns:
            φ after it; differentiable in everything that is.
        """
        live = [k for k, p in enumerate(phi) if p.requires_grad]
        if not live:
            return phi
        lr, count = self._rate(rates, last.state.step + 1), len(g)

        def run(rows: list[Any]) -> list[Tensor]:
            new, rest = rows[: len(phi)], rows[len(phi) :]
            before = Last(rest[:count], last.state.like(rest[2 * count :]))
            steps = self._through(new, rates, before, rest[count : 2 * count], live, allow_unused)
            moved = updated_parameters(None, [new[k] for k in live], steps, lr)
            for k, x in zip(live, moved, strict=True):
                new[k] = x
            return new

        with torch.enable_grad():
            return self._contained(rates, [*phi, *last.g, *g, *last.state.flat()], live, run)

    def _through(
        self,
        phi: list[Tensor],
        rates: list[Tensor],
        last: Last,
        g: Grads,
        live: Sequence[int],
        allow_unused: bool,
    ) -> list[Tensor | None]:
        """The gradients in φ of a loss whose gradients in the updated θ are g."""
        zeros = [phi[0].new_zeros(()) if x is None else torch.zeros_like(x) for x in last.g]
        moved, _ = self.theta(zeros, phi, rates, last.g, last.state)
        through = [
            (m, cotangent)
            for m, x, cotangent in zip(moved, last.g, g, strict=True)
            if x is not None and cotangent is not None and m.requires_grad
        ]
        return list(
            torch.autograd.grad(
                [m for m, _ in through],
                [phi[k] for k in live],
                [c for _, c in through],
                create_graph=True,
                allow_unused=allow_unused,
            )
        )
