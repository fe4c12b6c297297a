"""A learner of T tasks at once, with learn2learn's feel: call it, `adapt` it, call it again."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from fastkfo.inner_loop.buffers import MODES, Unbatchable, commit
from fastkfo.inner_loop.containment import spread
from fastkfo.inner_loop.devices import check_tree, device_of
from fastkfo.inner_loop.model import TaskModel, check_tasks
from fastkfo.inner_loop.step import InnerStep, Last, Rule
from fastkfo.optim.differentiate import gradients
from fastkfo.utils import ParameterSlots, clone_module
from fastkfo.utils.updating import replace_parameters


class BatchedLearner(nn.Module):
    """T clones of a learner in one: every parameter has a leading task axis.

    Made by `clone(tasks=T)` of a GBML, MAML or MetaSGD. The model runs for all tasks in one pass;
    every transform and update is one call. Results are those of T clones in learn2learn's loop, up
    to the draws of random modules, which differ from task to task here as there.

    A NaN or an infinity stays in its task: it reaches neither the other tasks nor the gradients of
    what they share.

    Args:
        rule: how the learner adapts.
        tasks: T, at least 1.
        buffers: "shared": batch norms' running statistics end up as learn2learn's loop leaves them
            (passes in eval mode read them as they were at this clone). "frozen": they do not move.
            "per_task": every task goes on with its own.

    Attributes:
        module: the model; its parameters are `[T, ...]`.
        tasks: T, the number of tasks.

    Raises:
        TypeError: `tasks` is no int.
        ValueError: `tasks` is below 1, `buffers` is unknown, or the learner's step cannot be taken
            for several tasks at once.
    """

    _model_at = "the `module` of a clone without `tasks`"  # fastkfo.nn says so to who passes this

    def __init__(self, rule: Rule, tasks: int, buffers: str = "shared") -> None:
        super().__init__()
        check_count("tasks", tasks, 1)
        if buffers not in MODES:
            raise ValueError(f"buffers: expected one of {MODES}, got {buffers!r}")
        if reason := rule.why_not_batched():
            raise ValueError(
                f"tasks: expected a learner that can be batched, got one where {reason}"
            )
        self.tasks, self._rule = tasks, rule
        slots = ParameterSlots(rule.module)
        own = [p.requires_grad for p in slots.params]
        self._shared = [None if o else p for o, p in zip(own, slots.params, strict=True)]
        rows = spread(slots.params, tasks)
        memo = dict(zip(slots.params, rows, strict=True))
        self.module = clone_module(rule.module, memo)
        self._model = TaskModel(self.module, tasks, buffers, each=False, own=own)
        self._step = InnerStep(rule, tasks)
        self._phi = [] if self._step.slots is None else list(self._step.slots.params)
        if rule.adapt_transform:
            self._phi = spread(self._phi, tasks)
        self._rates = rule.rates
        self._last: Last | None = None
        self._state = rule.state.like(spread(rule.state.flat(), tasks))

    def __getattr__(self, attr: str) -> Any:
        """The attribute of the learner, else that of the model, whose parameters are `[T, ...]`."""
        try:
            return super().__getattr__(attr)
        except AttributeError:
            return getattr(self.__dict__["_modules"]["module"], attr)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model for every task.

        Args:
            args: what the model takes; every tensor in it `[T, ...]`.
            kwargs: likewise.

        Returns:
            What the model returns; every tensor in it `[T, ...]`.

        Raises:
            ValueError: a tensor does not have T rows, or is on another device than the learner.
        """
        check_tasks("inputs", (args, kwargs), self.tasks)
        theta = self._theta()
        device = device_of(theta)
        for tree in (*args, *kwargs.values()):
            check_tree("inputs", tree, device, "the learner's parameters")
        second_order = not self._rule.first_order
        try:
            outputs = self._model(theta, second_order, args, kwargs)
        except Unbatchable as refused:
            self._model.go_one_by_one()
            outputs = self._model(theta, second_order, args, kwargs)
            warn_unbatchable(refused)
        commit([self._model.buffers])
        self._model.buffers.write_back()
        return outputs

    def put(self, theta: list[Tensor]) -> None:
        """Go on from other parameters, `[T, ...]`, as after a step."""
        self._model.slots.put(theta)

    def _let_go(self, keep_requires_grad: bool) -> None:
        """Before the parameters are detached: φ, the rates and the optimizer's state, too."""

        def cut(x: Tensor) -> Tensor:
            return x.detach().requires_grad_(keep_requires_grad and x.requires_grad)

        self._phi, self._rates = [cut(x) for x in self._phi], [cut(x) for x in self._rates]
        self._state, self._last = self._state.detached(), None

    def _theta(self) -> list[Tensor]:
        params = self._model.slots.params
        return [p if s is None else s for p, s in zip(params, self._shared, strict=True)]

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_nograd: bool | None = None,
        allow_unused: bool | None = None,
    ) -> None:
        """Take one step on every task's loss. An option left None is the learner's.

        Args:
            loss: one loss per task, `[T]`, computed with this learner; see `fastkfo.per_task`.
            first_order: whether the gradients are treated as constants.
            allow_nograd: whether parameters that require no gradient are left as they are.
            allow_unused: whether parameters that the loss does not use are left as they are.

        Raises:
            TypeError: `loss` is no tensor.
            ValueError: `loss` is not `[T]` or has no graph, or `lr` has no rate for this step. The
                learner is as it was.
            RuntimeError: autograd's own, with the option that would help.
        """
        check_losses(loss, self.tasks)
        rule = self._rule
        first_order = rule.first_order if first_order is None else first_order
        allow_nograd = rule.allow_nograd if allow_nograd is None else allow_nograd
        allow_unused = rule.allow_unused if allow_unused is None else allow_unused
        slots, state = self._model.slots, self._state
        self._step.check(state)
        g = gradients(
            loss.sum(), slots.params, not first_order, not first_order, allow_unused, allow_nograd
        )
        phi = self._phi
        if rule.adapt_transform and self._last is not None:
            phi = self._step.phi(phi, self._rates, self._last, g, allow_unused)
        new, self._state = self._step.theta(slots.params, phi, self._rates, g, state)
        self._phi = phi
        self._last = Last(g, state) if rule.adapt_transform else None
        slots.put(new)

    def task(self, index: int) -> nn.Module:
        """The model of one task, an ordinary module; its parameters lead back to this learner.

        Args:
            index: which task; from the end if negative.

        Returns:
            A clone of the model. Its buffers are this clone's, with "per_task" the task's own.

        Raises:
            IndexError: there is no such task.
        """
        if not -self.tasks <= index < self.tasks:
            raise IndexError(f"index: expected a task below {self.tasks}, got {index}")
        slots = self._model.slots
        memo = {p: p[index] for p in slots.params}
        module = clone_module(self.module, memo)
        own = {
            id(s.copy): s.values()[index].clone()
            for s in self._model.buffers.statistics.values()
            if s.own is not None
        }
        replace_parameters(module, own)
        return module

    def extra_repr(self) -> str:
        """The number of tasks."""
        return f"tasks={self.tasks}"


def warn_unbatchable(refused: Unbatchable) -> None:
    """Say that, and why, a model runs task after task."""
    warnings.warn(
        f"fastkfo: the model runs task after task, since it cannot be batched. {refused}",
        stacklevel=4,
    )


def check_count(name: str, value: object, least: int) -> None:
    """Raise unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_own_adapt(learner: Any) -> None:
    """Raise ValueError for a learner with an `adapt` of its own, which a batch would not call."""
    base: Any = next(c for c in type(learner).__mro__ if c.__module__.startswith("fastkfo."))
    if type(learner).adapt is not base.adapt:
        kind = type(learner).__name__
        raise ValueError(f"tasks: expected None, as {kind} has an 'adapt' of its own")


def check_losses(loss: object, tasks: int) -> None:
    """Raise unless `loss` is one loss per task with a graph."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected a tensor, got {type(loss).__name__}")
    if loss.shape != (tasks,):
        what = "a scalar" if loss.dim() == 0 else f"shape {list(loss.shape)}"
        hint = (
            "; a mean over tasks would give each 1/T of its gradient: compute the loss with "
            "fastkfo.per_task(loss), which gives one per task"
        )
        raise ValueError(f"loss: expected one loss per task, shape [{tasks}], got {what}{hint}")
    if not loss.requires_grad:
        raise ValueError(
            "loss: expected a tensor with a graph, got one that requires no gradient (computed "
            "under no_grad, detached, or with no adapted parameter in it)"
        )
