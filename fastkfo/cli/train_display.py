"""What ``fastkfo train`` shows: a progress bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from fastkfo.cli.bar import Barred
from fastkfo.training import Evaluation, Trainer, Watcher

__all__ = ["Display"]

SHOWN_SKIPS = 3  # of iterations without a step; after that the count at the end must do


class Display(Barred, Watcher):
    """Rate, time left and the current meta-loss; every validation on a line of its own.

    Args:
        console: Where.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(
            console,
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("loss {task.fields[loss]}"),
        )
        self._skips = 0

    def begin(self, trainer: Trainer) -> None:
        """Shows what is about to run."""
        config = trainer.config
        count = sum(p.numel() for p in trainer.built.train.parameters())
        self._print(
            f"{config.method} on {config.dataset}, {config.backbone}, {count:,} parameters, "
            f"iterations {trainer.iteration} to {config.iterations}, in {trainer.folder}"
        )
        self._first, self._start = trainer.iteration, time.perf_counter()
        self._task = self._progress.add_task(
            "", total=config.iterations, completed=trainer.iteration, rate="", loss="-"
        )

    def iterated(self, iteration: int, loss: float) -> None:
        """Moves the bar."""
        rate = (iteration - self._first) / (time.perf_counter() - self._start)
        self._progress.update(
            self._task, completed=iteration, rate=f"{rate:.1f} it/s", loss=f"{loss:.4f}"
        )

    def skipped(self, iteration: int, why: str) -> None:
        """Says so, the first few times."""
        self._skips += 1
        if self._skips <= SHOWN_SKIPS:
            self._print(f"  iteration {iteration}: no step, {why}")

    def validated(self, iteration: int, found: Evaluation, best: bool) -> None:
        """Says what was found."""
        rate = (iteration - self._first) / max(time.perf_counter() - self._start, 1e-9)
        self._print(
            f"  iteration {iteration}: validation {found}{', the best so far' if best else ''} "
            f"({rate:.1f} it/s)"
        )

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False)
