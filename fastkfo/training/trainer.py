"""The training loop: steps, validations, checkpoints, and how a run goes on."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastkfo.training import folders, random_states, sources
from fastkfo.training.checkpoints import (
    CheckpointError,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from fastkfo.training.config import TrainConfig, write_config
from fastkfo.training.contents import check_contents
from fastkfo.training.evaluation import Evaluation, config_of, measure
from fastkfo.training.methods import build, check_method
from fastkfo.training.outcome import Diverged, Result, Watcher
from fastkfo.training.resumption import (
    as_given,
    best_is_there,
    checkpoint_of,
    continued,
    load_best,
)
from fastkfo.training.trackers import Tracker, check_installed, trackers

__all__ = ["Trainer"]


class Trainer:
    """Meta-trains what a config describes, in a run folder.

    Every iteration draws a meta-batch, takes the mean query loss of an `InnerLoop`, and a step of
    Adam; where loss or gradient is not finite, nothing moves and it is counted. A run that was
    interrupted, or killed, goes on from its last checkpoint with the same numbers.

    Args:
        config: What to train.
        overwrite: Whether a run that is in the folder is removed.
        watch: Is told how it goes.
        stop: Asked after every iteration; True ends the run there, with a checkpoint.

    Attributes:
        config: The config, with what ``auto`` and None stand for in their place.
        folder: The run folder; nothing is written before `run`.
        built: The learner and its inner loops.
        problem: The tasks.
        optimizer: Adam.
        iteration: Iterations done.

    Raises:
        ModuleNotFoundError: If something that the config asks for is not installed.
        ValueError: If an option, the data or the folder cannot be used.

    Example:
        >>> result = Trainer(TrainConfig(method="anil-kfo", iterations=200)).run()
        >>> print(result.test)
        accuracy 73.87 ± 0.52 %
    """

    _random: dict[str, Any]
    _last: tuple[int, ...] | None

    def __init__(
        self,
        config: TrainConfig,
        *,
        overwrite: bool = False,
        watch: Watcher | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        check_method(config)
        self._given, self._overwrite = config, overwrite
        self.config, self.folder = sources.settled(config), config.folder
        folders.check_writable(self.folder)
        if not overwrite:
            folders.check_free(self.folder)
        self._set_up(watch, stop)

    @classmethod
    def resume(
        cls,
        checkpoint: str | Path,
        *,
        watch: Watcher | None = None,
        stop: Callable[[], bool] = lambda: False,
        **changes: Any,
    ) -> Trainer:
        """The trainer of a run that goes on from a checkpoint.

        Args:
            checkpoint: The file, or a run folder: then its ``last.pt``.
            watch: As for a new trainer.
            stop: Likewise.
            changes: Options for the rest of the run; those that would make another training of it
                must be as they were.

        Returns:
            The trainer; `run` does the iterations that are left.

        Raises:
            CheckpointError: If the checkpoint cannot be used, or an option differs.
            ValueError: If an option is unknown or cannot be used.
        """
        path = checkpoint_of(Path(checkpoint).expanduser())
        last = folders.mark(path.parent / "last.pt")
        state = load_checkpoint(path)
        trainer = cls.__new__(cls)
        trainer.config = continued(path, config_of(state), state["iteration"], changes)
        trainer.folder, trainer._overwrite = trainer.config.folder, False
        trainer._given = as_given(trainer.config)
        folders.check_writable(trainer.folder)
        trainer._set_up(watch, stop)
        trainer._load(state)
        trainer._last = last
        if trainer._best is not None:
            best_is_there(trainer.config, trainer._best_iteration, trainer.iteration)
        return trainer

    def run(self) -> Result:
        """Trains until the iterations are done, and tests.

        Returns:
            What came of it.

        Raises:
            CheckpointError: If ``best.pt`` or ``last.pt`` is no longer that of this run.
            Diverged: If ``patience`` iterations in a row were not finite.
            ValueError: If the folder cannot be written to, or another run is or was there.
        """
        resumed = self._saved >= 0
        with folders.held(self.folder, resumed=resumed, overwrite=self._overwrite):
            if resumed:
                self._check_folder()
            write_config(self.folder / "config.toml", self._given)
            return self._run()

    def _run(self) -> Result:
        self._cut = False
        with random_states.own(self._random, self._device), self._tracked():
            try:
                self._iterate()
            finally:
                self._random = random_states.capture(self._device)
            interrupted = self.iteration < self.config.iterations or self._cut
            test = None if interrupted else self._test()
        if test is not None and test.cut:
            test, interrupted = None, True
        result = Result(
            self.folder,
            self.iteration,
            self._loss,
            self._best,
            self._best_iteration,
            test,
            self._skipped,
            interrupted,
        )
        if not interrupted:
            result.write()
        return result

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; see `load_checkpoint`."""
        features = self.built.features
        return {
            "config": self.config.to_mapping(),
            "iteration": self.iteration,
            "learner": self.built.learner.state_dict(),
            "features": None if features is None else features.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "tasks": self.problem.tasks["train"].state_dict(),
            "random": random_states.capture(self._device),
            "validation": {
                "best": self._best,
                "best_iteration": self._best_iteration,
                "last_iteration": self._validated,
            },
            "skipped": {"all": self._skipped, "in_a_row": self._in_a_row},
            "loss": self._loss,
        }

    def _set_up(self, watch: Watcher | None, stop: Callable[[], bool]) -> None:
        self._watch, self._stop = watch or Watcher(), stop
        check_installed(self.config)
        self.problem = sources.load(self.config)
        self._device = torch.device(self.config.device)
        self.built = build(
            self.config, self.problem.shape, self.problem.outputs, self.problem.regression
        )
        learned = list(self.built.train.parameters())
        self._learned = [p for p in learned if p.requires_grad]
        self._buffers = list(self.built.train.buffers())  # running statistics
        self.optimizer = torch.optim.Adam(self._learned, lr=self.config.meta_lr)
        self.iteration, self._loss = 0, math.nan
        self._skipped, self._in_a_row = 0, 0
        self._best: float | None = None
        self._best_iteration, self._validated, self._saved = 0, 0, -1
        self._random = random_states.seeded(self.config.seed, self._device)
        self._fresh = {
            split: self.problem.tasks[split].state_dict() for split in ("validation", "test")
        }

    def _load(self, state: dict[str, Any]) -> None:
        load_weights(self.built.learner, state["learner"], "learner")
        load_weights(self.built.features, state["features"], "feature extractor")
        check_contents(state, self.optimizer)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.problem.tasks["train"].load_state_dict(state["tasks"])
            with random_states.own(state["random"], self._device):
                self._random = state["random"]
            self._best = state["validation"]["best"]
            self._best_iteration = state["validation"]["best_iteration"]
            self._validated = state["validation"]["last_iteration"]
            self._skipped, self._in_a_row = (state["skipped"][k] for k in ("all", "in_a_row"))
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
                ValueError) as error:  # fmt: skip
            raise CheckpointError(f"checkpoint: it does not go with this run: {error}") from None
        self.iteration = self._saved = state["iteration"]
        self._loss = state["loss"]

    def _check_folder(self) -> None:
        """Raises unless a run that goes on finds what it left; writes a best.pt that is missing."""
        if folders.mark(self.folder / "last.pt") != self._last:
            raise CheckpointError(
                f"checkpoint: another training wrote {self.folder / 'last.pt'} meanwhile; resume it"
            )
        if self._best is None:
            return
        if not best_is_there(self.config, self._best_iteration, self.iteration):
            with random_states.own(self._random, self._device):
                save_checkpoint(self.folder / "best.pt", self.state())

    @contextmanager
    def _tracked(self) -> Iterator[None]:
        self._trackers: list[Tracker] = trackers(
            self.config, self.folder, self.iteration, self._validated
        )
        try:
            yield
        finally:
            for tracker in self._trackers:
                tracker.close()

    def _iterate(self) -> None:
        """Steps, validations and checkpoints, until the end or a stop."""
        config = self.config
        while True:
            if self._validation_due():
                self._validate()
            if self.iteration >= config.iterations or self._cut or self._stop():
                break
            self._step()
            every = config.checkpoint_every
            if every and self.iteration % every == 0 and not self._validation_due():
                self._save()
        if self._saved != self.iteration:
            self._save()

    def _step(self) -> None:
        start = time.perf_counter()
        episodes = self.problem.tasks["train"].sample(self.config.meta_batch)
        buffers = [b.clone() for b in self._buffers]
        self.optimizer.zero_grad()
        loss = self.built.train(*episodes).loss.mean()
        loss.backward()
        self._loss = loss.item()
        self.iteration += 1
        why = self._not_finite()
        if why is None:
            self.optimizer.step()
            self._in_a_row = 0
        else:
            for buffer, before in zip(self._buffers, buffers, strict=True):
                buffer.copy_(before)
            self._skip(why)
        seconds = round(time.perf_counter() - start, 6)
        self._track("train", {"loss": self._loss, "stepped": why is None, "seconds": seconds})
        self._watch.iterated(self.iteration, self._loss)
        if self._in_a_row >= self.config.patience:
            raise Diverged(
                f"{self._in_a_row} iterations in a row, up to {self.iteration}, had {why}; a "
                f"smaller fast_lr ({self.config.fast_lr}) or meta_lr ({self.config.meta_lr}) may "
                "help"
            )

    def _not_finite(self) -> str | None:
        """What keeps this iteration from a step, or None."""
        if not math.isfinite(self._loss):
            return f"a meta-loss of {self._loss}"
        gradients = [p.grad for p in self._learned if p.grad is not None]
        # One look at all of them; a norm that overflows would be no step to take either.
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            return "a meta-gradient that was not finite"
        return None

    def _skip(self, why: str) -> None:
        self._skipped += 1
        self._in_a_row += 1
        self._watch.skipped(self.iteration, why)

    def _validation_due(self) -> bool:
        every, last = self.config.validate_every, self.config.iterations
        due = every > 0 and (self.iteration % every == 0 or self.iteration == last)
        return due and self.iteration > 0 and self._validated != self.iteration

    def _validate(self) -> None:
        found = self._measured("validation", self.config.validation_tasks)
        if found.cut:
            self._cut = True  # comes again when the run goes on
            return
        best = found.better_than(self._best)
        self._validated = self.iteration
        if best:
            self._best, self._best_iteration = found.after.mean, self.iteration
        self._track("validation", {**found.to_mapping(), "best": best})
        self._save()
        if best:  # after last.pt: a run that is killed in between can write it from that one
            save_checkpoint(self.folder / "best.pt", self.state())
        self._watch.validated(self.iteration, found, best)

    def _test(self) -> Evaluation | None:
        """On the best weights; the last ones are put back."""
        if self.config.test_tasks == 0:
            return None
        now = self.state()
        # Copies: a state dict's tensors are the parameters' own.
        last = {key: copy.deepcopy(now[key]) for key in ("learner", "features")}
        try:
            if self._best is not None:
                self._put(load_best(self.config, self._best_iteration))
            found = self._measured("test", self.config.test_tasks)
        finally:
            self._put(last)
        if not found.cut:
            self._track("test", found.to_mapping())
        return found

    def _measured(self, split: str, count: int) -> Evaluation:
        tasks = self.problem.tasks[split]
        tasks.load_state_dict(self._fresh[split])  # the same tasks every time
        return measure(
            self.built,
            tasks,
            count,
            regression=self.problem.regression,
            steps=self.config.steps,
            chunk=self.config.meta_batch,
            stop=self._stop,
        )

    def _put(self, state: dict[str, Any]) -> None:
        load_weights(self.built.learner, state["learner"], "learner")
        load_weights(self.built.features, state["features"], "feature extractor")

    def _save(self) -> None:
        for tracker in self._trackers:
            tracker.flush()  # first: of what a checkpoint is past, nothing is computed again
        save_checkpoint(self.folder / "last.pt", self.state())
        self._saved, self._last = self.iteration, folders.mark(self.folder / "last.pt")

    def _track(self, kind: str, values: dict[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.add(kind, self.iteration, values)
