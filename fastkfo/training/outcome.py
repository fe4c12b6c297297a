"""What a training tells: while it goes, and at its end."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from fastkfo.training.checkpoints import write_whole
from fastkfo.training.evaluation import Evaluation

__all__ = ["Diverged", "Result", "Watcher"]


class Diverged(RuntimeError):
    """Too many losses or meta-gradients in a row were not finite."""


class Watcher:
    """Is told how a training goes; a subclass shows it."""

    def iterated(self, iteration: int, loss: float) -> None:
        """After every iteration: how many are done, and the meta-loss."""

    def skipped(self, iteration: int, why: str) -> None:
        """After an iteration without a step."""

    def validated(self, iteration: int, found: Evaluation, best: bool) -> None:
        """After a validation; whether it is the best so far."""


@dataclass(frozen=True)
class Result:
    """What comes of a run.

    Attributes:
        folder: The run folder.
        iteration: Iterations done.
        loss: The last meta-loss, or NaN without any.
        best: The best validation score, or None.
        best_iteration: Where that was.
        test: On the test tasks, with the best weights; None if there was no test.
        skipped: Iterations without a step, because something was not finite.
        interrupted: Whether it was stopped before the end.
    """

    folder: Path
    iteration: int
    loss: float
    best: float | None
    best_iteration: int
    test: Evaluation | None
    skipped: int
    interrupted: bool

    def write(self) -> None:
        """Writes ``result.json`` into the folder."""
        values = {
            "iterations": self.iteration,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "best_validation": self.best,
            "best_iteration": self.best_iteration,
            "skipped": self.skipped,
            "test": None if self.test is None else self.test.to_mapping(),
        }
        text = json.dumps(values, indent=1, allow_nan=False) + "\n"
        write_whole(self.folder / "result.json", lambda file: file.write(text.encode()))
