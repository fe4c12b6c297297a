"""The inner loop as a module: adapt T tasks at once, and ask for their query losses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastkfo.inner_loop import buffers as task_buffers
from fastkfo.inner_loop import memory as memory_modes
from fastkfo.inner_loop import recorder
from fastkfo.inner_loop.at_once import adapted_at_once, at_once, fused_of, in_one_call
from fastkfo.inner_loop.buffers import TaskBuffers, Unbatchable, commit, commit_all
from fastkfo.inner_loop.clones import by_clones, check_clones
from fastkfo.inner_loop.devices import check_devices
from fastkfo.inner_loop.guards import all_or_nothing, normal_mode
from fastkfo.inner_loop.inputs import (
    Batch,
    Group,
    check_batch,
    check_given,
    grouped,
)
from fastkfo.inner_loop.known_models import Unfusable
from fastkfo.inner_loop.learner import BatchedLearner, check_count
from fastkfo.inner_loop.leaves import Leaves
from fastkfo.inner_loop.options import (
    as_loss,
    check_choice,
    check_steps,
    check_weights,
    learner_options,
    overridden,
    params_of,
    rule_of,
)
from fastkfo.inner_loop.piece import in_order
from fastkfo.inner_loop.pieces import run_pieces
from fastkfo.inner_loop.prompt import Habit
from fastkfo.inner_loop.remembered import Remembered
from fastkfo.inner_loop.run import Outcome, Run, Settings, TaskLoss

BACKENDS = ("auto", "fused", "batched", "loop")

Parts = list[list[TaskBuffers]]
Way = Callable[[], tuple[Outcome, Parts]]


class InnerLoop(nn.Module):
    """Adapts a learner to T tasks at once and gives their query losses.

    With θ_0 the learner's parameters, K steps `θ_{k+1} = θ_k − lr U(∇ℓ_s(θ_k))` per task on its
    support loss ℓ_s, then the query loss ℓ_q(θ_K). The results, and their gradients in everything
    that is learned, are those of learn2learn's loop over `clone` and `adapt`.

    A NaN or an infinity in one task never raises and never leaves it: `finite` says which tasks'
    losses are not finite, and the gradients of what tasks share are as if these were not there. (Of
    a learner with an `adapt` or `clone` of its own, this holds for losses that are not finite; a
    NaN that first appears in a derivative is not seen.)

    What is learned are the parameters of the learner, the features and losses that are modules,
    step weights, and the batch where it requires a gradient. Other tensors, which a function closes
    over, get their gradient where no pass is repeated: with `memory="full"` and no `chunk_size`.

    Args:
        learner: a GBML, MAML or MetaSGD. Options that are None here are its own.
        loss: of one task: predictions and targets to one number. A module's parameters are learned.
        steps: K, at least 0. With a `PerStepLR` as many as it has rates for, or the last would not
            be learned; a call may ask for fewer.
        query_loss: ℓ_q, if it is another one.
        features: a feature extractor in front of the model (ANIL): not adapted, but trained through
            the query loss. It sees all samples of all tasks at once; its batch norms take the
            statistics of each task's support and query together.
        first_order: whether gradients are treated as constants of the meta-gradient.
        adapt_transform: (GBML) whether the transforms are adapted, too.
        allow_unused: (GBML, MAML) whether parameters that a loss does not use are left as they are.
        allow_nograd: (GBML, MAML) whether parameters that require no gradient are left.
        memory: "full" keeps the whole graph, "checkpoint" the state before every step, "adjoint" no
            more than θ; the latter two compute every step once more in the backward pass, and are
            differentiable once. Same gradients, same random draws (PyTorch's; Python's own `random`
            is not put back).
        buffers: "shared": batch norms' running statistics end up as learn2learn's loop leaves them;
            in eval mode they are read as they were before. "frozen": they do not move. "per_task":
            every task goes on with its own.
        chunk_size: how many tasks at a time; forward keeps nothing but losses and predictions, and
            the backward pass runs every chunk again. None: all.
        backend: "fused" (all steps of all tasks in one native call: linear heads and MLPs, see
            docs/inner_loop.md), "batched" (all tasks in one pass) or "loop" (task after task, for
            any model). "auto" is the first of these that can, with one warning, that says why,
            where it is "loop". A name never falls back.
        capture: whether calls with CUDA tensors are recorded as CUDA graphs and replayed, from the
            third of a kind on: results and gradients are the same, without the time that launches
            take. "auto" records models and losses of torch's, this package's and learn2learn's own
            classes; True any, and raises where that fails: what they do must then depend on their
            tensors and attributes alone. False: never. docs/gpu.md has the conditions.

    Attributes:
        learner: the learner.
        features: the feature extractor, or None.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a value that is not allowed.

    Source: Finn, Abbeel, Levine 2017; Arnold, Iqbal, Sha 2021. docs/inner_loop.md has the
    derivation.
    """

    _model_at = "its `learner.module`"  # what fastkfo.nn tells who passes the loop instead

    def __init__(
        self,
        learner: nn.Module,
        loss: Callable[..., Tensor],
        steps: int,
        *,
        query_loss: Callable[..., Tensor] | None = None,
        features: nn.Module | None = None,
        first_order: bool | None = None,
        adapt_transform: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        memory: str = "full",
        buffers: str = "shared",
        chunk_size: int | None = None,
        backend: str = "auto",
        capture: str | bool = "auto",
    ) -> None:
        super().__init__()
        given = {
            "first_order": first_order,
            "adapt_transform": adapt_transform,
            "allow_unused": allow_unused,
            "allow_nograd": allow_nograd,
        }
        self.options = learner_options(learner, given)
        check_count("steps", steps, 0)
        check_steps(rule_of(learner, self.options), steps, all_of_them=True)
        check_choice("memory", memory, memory_modes.MODES)
        check_choice("buffers", buffers, task_buffers.MODES)
        check_choice("backend", backend, BACKENDS)
        check_choice("capture", capture, ("auto", True, False))
        if chunk_size is not None:
            check_count("chunk_size", chunk_size, 1)
        if features is not None and not isinstance(features, nn.Module):
            raise TypeError(f"features: expected a module, got {type(features).__name__}")
        self.learner, self.features, self.steps = learner, features, steps
        self.loss = as_loss("loss", loss)
        self.query_loss = self.loss if query_loss is None else as_loss("query_loss", query_loss)
        without = {x for x in (loss, query_loss) if isinstance(x, nn.Module)} - {
            self.loss, self.query_loss,
        }  # fmt: skip
        if without:  # of parameters; so that `eval`, `to` and `state_dict` reach their buffers
            self.loss_modules = nn.ModuleList(sorted(without, key=lambda x: x is not loss))
        self.memory, self.buffer_mode = memory, buffers
        self.chunk_size, self.backend, self.capture = chunk_size, backend, capture
        self._refused: str | None = None  # why the model runs task after task
        self._said = False
        self.remembered, self.habit, self.recorder = Remembered(), Habit(), recorder.Recorder()
        if backend == "fused" and (reason := self.why_not_fused()):
            raise Unfusable(reason).as_error()

    def forward(
        self,
        x_s: Any,
        y_s: Any,
        x_q: Any,
        y_q: Any = None,
        *,
        steps: int | None = None,
        step_weights: Sequence[float] | Tensor | None = None,
    ) -> Outcome:
        """Adapt to every task's support, and ask for the query.

        Under `no_grad` or `inference_mode` nothing is kept for a meta-gradient.

        Args:
            x_s: support inputs `[T, S, ...]`, or a tuple or dict of such, which the model gets as
                one argument; or a list with one entry `[S, ...]` per task, of any shapes.
            y_s: support targets, likewise.
            x_q: query inputs `[T, Q, ...]`, likewise.
            y_q: query targets, likewise; None: predictions only.
            steps: K of this call.
            step_weights: K weights; the loss is then the weighted sum of the query losses after
                every step, as in MAML++.

        Returns:
            `loss [T]` (None without `y_q`); `predictions [T, Q, ...]` of the adapted model and
            `support_loss [T, K]`, both detached; `finite [T]`. For lists of tasks, `predictions` is
            a list.

        Raises:
            TypeError: an input is of the wrong type.
            ValueError: inputs do not have the same T, are empty or on another device than the
                learner, `steps` or `step_weights` do not fit, or a label is out of range.
        """
        given = Batch(x_s, y_s, x_q, y_q)
        if x_q is None:
            raise TypeError("x_q: expected query inputs [T, Q, ...], got NoneType")
        check_given(given)
        small = type(x_s) is Tensor and x_s.device.type != recorder.DEVICE
        if small and step_weights is None and self.capture is not True:
            found = at_once(self, given, steps)
            if found is not None:
                return found
        recorded = self.recorder.wanted(self, isinstance(x_s, list))
        if recorded and step_weights is None:
            found = self.recorder.at_once(self, given, steps)
            if found is not None:
                return found
        groups = grouped(given) if isinstance(x_s, list) else [Group([], given)]
        for group in groups:
            check_batch(group.batch)
        settings = self.settings(steps)
        weights = check_weights(step_weights, settings.steps, y_q, groups[0].batch)
        check_devices(settings, [group.batch for group in groups], weights)
        if isinstance(x_s, list):
            with normal_mode():
                return self._listed(settings, groups, weights)
        if recorded:
            found = self.recorder.outcome(self, given, settings.steps, weights)
            if found is not None:
                return found
        return self.eager(given, settings.steps, weights)

    def eager(self, batch: Batch, steps: int, weights: Tensor | None) -> Outcome:
        """A call for tasks of equal shapes, as it runs without a recording.

        Args:
            batch: the tasks, checked.
            steps: K, the number of steps.
            weights: of the query losses after every step, or None.

        Returns:
            The outcome.
        """
        if weights is None and type(batch.x_s) is Tensor:
            found = at_once(self, batch, steps)
            if found is not None:
                return found
        tasks = batch.tensors()[0].shape[0]
        with normal_mode():
            return self._stacked(self.settings(steps), batch, tasks, weights)

    def adapt(self, x_s: Any, y_s: Any, *, steps: int | None = None) -> BatchedLearner:
        """The batched learner after K steps, with its graph.

        Args:
            x_s: support inputs, as for the call.
            y_s: support targets, likewise; no lists of tasks.
            steps: K of this call.

        Returns:
            The learner; what `learner.clone(tasks=T)` gives after as many calls of `adapt`. With
            `features` it adapts to those of the support, and is to be called with features.

        Raises:
            TypeError: an input is of the wrong type.
            ValueError: inputs do not fit, are empty or on another device than the learner, or the
                learner cannot be batched.
        """
        batch = Batch(x_s, y_s)
        check_given(batch)
        tasks = check_batch(batch)
        if reason := self.own_step():
            raise ValueError(f"learner: expected one that can be batched, got one where {reason}")
        settings = self.settings(steps)
        check_devices(settings, [batch])
        with normal_mode():
            batch = batch.normal()
            with torch.enable_grad():
                if self.features is not None:
                    run = Run(settings, batch, tasks, weighted=False)
                    batch = run.featured(self.leaves(batch, None))
                    commit([run.buffers[1]])
                learner = BatchedLearner(settings.rule, tasks, self.buffer_mode)
                if adapted_at_once(self, learner, batch, settings.steps):
                    return learner
                loss = TaskLoss(self.loss, tasks, each=False)
                params = self.leaves(batch, None).losses
                second_order = not settings.rule.first_order
                for _ in range(settings.steps):
                    predictions = learner(batch.x_s)
                    learner.adapt(loss(params, second_order, predictions, batch.y_s))
        return learner

    def why_one_by_one(self) -> str | None:
        """Why the model runs task after task, as far as is known; None if it does not."""
        if self.backend == "loop":
            return "backend='loop'"
        return self.own_step() or self._refused

    def why_not_fused(self, batch: Batch | None = None) -> str | None:
        """Why the inner loop is not one native call; without a batch, as far as that tells."""
        try:
            fused = fused_of(self, None)
            if batch is not None and self.features is None:
                fused.inputs(batch)
        except Unfusable as refused:
            return str(refused)
        return None

    def settings(self, steps: int | None = None) -> Settings:
        """What does not change from task to task."""
        if steps is not None:
            check_count("steps", steps, 0)
        rule = rule_of(self.learner, self.options)
        count = self.steps if steps is None else steps
        check_steps(rule, count, all_of_them=False)
        return Settings(
            rule=rule,
            loss=self.loss,
            query_loss=self.query_loss,
            features=self.features,
            steps=count,
            memory=self.memory,
            buffers=self.buffer_mode,
            each=False,
        )

    def own_step(self) -> str | None:
        """Why the learner is known by its methods alone, or None."""
        rule = rule_of(self.learner, self.options)
        return rule.why_not_batched() or overridden(self.learner)

    def leaves(self, batch: Batch, weights: Tensor | None) -> Leaves:
        """Every tensor that a meta-gradient can reach."""
        rule = rule_of(self.learner, self.options)
        losses = [x for x in (self.loss, self.query_loss) if isinstance(x, nn.Module)]
        if self.query_loss is self.loss:
            losses = losses[:1]
        return Leaves(
            theta=params_of(rule.module),
            phi=params_of(rule.compute_update),
            rates=rule.rates,
            state=rule.state.flat(),
            features=params_of(self.features),
            losses=[p for loss in losses for p in params_of(loss)],
            weights=[] if weights is None else [weights],
            data=batch.tensors(),
        )

    def _stacked(
        self, settings: Settings, batch: Batch, tasks: int, weights: Tensor | None
    ) -> Outcome:
        """T tasks of equal shapes."""
        batch = batch.normal()

        def batched() -> tuple[Outcome, Parts]:
            return self._pieces(settings, batch, tasks, weights, self.chunk_size or tasks)

        def one_by_one() -> tuple[Outcome, Parts]:
            return self._pieces(replace(settings, each=True), batch, tasks, weights, 1)

        def clones() -> tuple[Outcome, Parts]:
            return by_clones(self.learner, self.options, settings, batch, weights), []

        found, parts = self._first_that_can(batched, one_by_one, clones)
        commit_all(parts, None)
        return found

    def _listed(self, settings: Settings, groups: list[Group], weights: Tensor | None) -> Outcome:
        """Tasks of any shapes, group by group; or one by one, in their order."""
        groups = [group._replace(batch=group.batch.normal()) for group in groups]
        indices = [t for group in groups for t in group.indices]
        order = sorted(range(len(indices)), key=indices.__getitem__)
        places = {t: (g.batch, k) for g in groups for k, t in enumerate(g.indices)}
        rows = [batch.rows(k, k + 1) for batch, k in (places[t] for t in range(len(places)))]

        def batched() -> tuple[Outcome, Parts]:
            found = []
            for group in groups:
                count = len(group.indices)
                size = self.chunk_size or count
                found.append(self._pieces(settings, group.batch, count, weights, size))
            return in_order([x for x, _ in found], order), [p for _, ps in found for p in ps]

        def one_by_one() -> tuple[Outcome, Parts]:
            each = replace(settings, each=True)
            found = [self._pieces(each, row, 1, weights, 1) for row in rows]
            return in_order([x for x, _ in found], None), [p for _, ps in found for p in ps]

        def clones() -> tuple[Outcome, Parts]:
            found = [by_clones(self.learner, self.options, settings, row, weights) for row in rows]
            return in_order(found, None), []

        before = self._refused
        found, parts = self._first_that_can(batched, one_by_one, clones)
        grouped_too = before is None and self._refused is None and self.backend != "loop"
        commit_all(parts, order if grouped_too else None)
        return found

    def _pieces(
        self, settings: Settings, batch: Batch, tasks: int, weights: Tensor | None, size: int
    ) -> tuple[Outcome, Parts]:
        if not settings.each:
            try:
                return in_one_call(self, settings, batch, tasks, weights)
            except Unfusable as refused:
                if self.backend == "fused":
                    raise refused.as_error() from refused
        leaves = self.leaves(batch, weights)
        again = self.chunk_size is not None
        return run_pieces(settings, leaves, batch, tasks, size, self.habit, again)

    def _first_that_can(self, batched: Way, one_by_one: Way, clones: Way) -> tuple[Outcome, Parts]:
        if (reason := self.own_step()) is not None:
            check_clones(self, reason)
            with all_or_nothing(self.learner, self.features):
                found = clones()
            self._say_once(reason)
            return found
        if self.backend == "loop" or self._refused is not None:
            with all_or_nothing(self.learner, self.features):
                return one_by_one()
        try:
            return batched()
        except Unbatchable as refused:
            if self.backend == "batched":
                raise ValueError(
                    f"backend: expected a model that can be batched, for 'batched'. {refused}"
                ) from refused
            reason = str(refused)
        with all_or_nothing(self.learner, self.features):
            found = one_by_one()
        self._say_once(reason)
        self._refused = reason
        return found

    def _say_once(self, reason: str) -> None:
        if self.backend != "loop" and not self._said:
            self._said = True
            warnings.warn(
                f"fastkfo: tasks run one after the other, since they cannot be batched. {reason}",
                stacklevel=6,
            )

    def extra_repr(self) -> str:
        """The options that are not the default ones."""
        return (
            f"steps={self.steps}, memory={self.memory!r}, buffers={self.buffer_mode!r}, "
            f"chunk_size={self.chunk_size}, backend={self.backend!r}"
        )
