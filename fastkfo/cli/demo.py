"""``fastkfo demo``: few-shot learning on real digits, in three minutes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn

from fastkfo.cli.bar import Barred
from fastkfo.cli.demo_methods import Settings, build_runs
from fastkfo.cli.demo_notes import footnotes
from fastkfo.cli.demo_plot import write_plot
from fastkfo.cli.demo_report import record, table, write_json
from fastkfo.cli.demo_training import TaskSets, measure, test, train
from fastkfo.cli.interrupts import Interrupts
from fastkfo.cli.out_folder import check_writable

__all__ = ["demo"]


def demo(
    minutes: Annotated[float, typer.Option(help="At most this, for everything.")] = 3.0,
    iterations: Annotated[int, typer.Option(help="Meta-iterations at most.", min=1)] = 300,
    seed: Annotated[int, typer.Option(help="Of initial weights and tasks.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="Folder for demo.png and demo.json.")] = Path(
        "fastkfo-demo"
    ),
    ways: Annotated[int, typer.Option(help="Classes per task.", min=2)] = 5,
    shots: Annotated[int, typer.Option(help="Support images per class.", min=1)] = 5,
    queries: Annotated[int, typer.Option(help="Query images per class.", min=1)] = 15,
    steps: Annotated[int, typer.Option(help="Inner steps.", min=1)] = 5,
    meta_batch: Annotated[int, typer.Option(help="Tasks per meta-iteration.", min=1)] = 4,
    inner_lr: Annotated[float, typer.Option(help="Inner learning rate.")] = 0.3,
    meta_lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 0.001,
    extra_layers: Annotated[int, typer.Option(help="Layers added in 'MAML + linear'.", min=1)] = 3,
    test_tasks: Annotated[int, typer.Option(help="Test tasks.", min=2)] = 250,
    valid_tasks: Annotated[int, typer.Option(help="Validation tasks.", min=2)] = 50,
    rounds: Annotated[int, typer.Option(help="Rounds of timing.", min=1)] = 15,
    threads: Annotated[
        int, typer.Option(help="torch's threads; tensors this small gain nothing from more.", min=1)
    ] = 1,
) -> None:
    """Trains MAML, MAML with added linear layers, and MAML-KFO on digits; compares them.

    Prints one table, and writes demo.png and demo.json. Ctrl-C ends it with what there is.

    Raises:
        BadParameter: If an option is out of range, or the folder cannot be written to.
        Exit: With 130 after Ctrl-C, 143 after SIGTERM.
    """
    for name, value in (("minutes", minutes), ("inner-lr", inner_lr), ("meta-lr", meta_lr)):
        if not (math.isfinite(value) and value > 0):
            raise typer.BadParameter(
                f"expected a positive finite number, got {value}", param_hint=f"--{name}"
            )
    settings = Settings(
        minutes, iterations, seed, out, ways, shots, queries, steps, meta_batch, inner_lr, meta_lr,
        extra_layers, test_tasks, valid_tasks, rounds, threads,
    )  # fmt: skip
    try:
        tasks = TaskSets(settings)
    except ValueError as error:  # too few classes or images
        raise typer.BadParameter(str(error)) from None
    check_writable(out, ("demo.png", "demo.json"))
    console = Console(highlight=False)
    runs = build_runs(settings)
    with Interrupts() as interrupts, _threads(threads):
        with _Display(console) as display:
            for title, phase in (
                ("training", lambda notify: train(runs, tasks, settings, interrupts, notify)),
                ("testing", lambda notify: test(runs, tasks.test, 2 * steps, interrupts, notify)),
                ("timing", lambda notify: measure(runs, tasks, settings, interrupts, notify)),
            ):
                if interrupts.signal is None:
                    display.start(title)
                    phase(display.notify)
        cut_by = None if interrupts.signal is None else interrupts.signal.name
        if cut_by is not None:
            console.print(f"{cut_by}: writing what there is (once more to quit at once).")
        console.print(table(runs, settings), crop=False, no_wrap=True)
        for note in footnotes(runs, settings, cut_by):
            console.print(note, style="dim")
        write_json(out / "demo.json", record(runs, settings, cut_by))
        write_plot(out / "demo.png", runs, settings)
        console.print(f"Wrote {out / 'demo.png'} and {out / 'demo.json'}", soft_wrap=True)
    if interrupts.exit_code:
        raise typer.Exit(interrupts.exit_code)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


class _Display(Barred):
    """A progress bar on a terminal; elsewhere a line per phase and validation."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            console,
            TextColumn("{task.description:8}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[rate]}"),
        )
        self._title, self._start = "", 0.0

    def start(self, title: str) -> None:
        self._title, self._start = title, time.perf_counter()
        self._task = self._progress.add_task(title, total=1.0, rate="")
        if not self._console.is_terminal:
            self._console.print(title)

    def notify(self, share: float, text: str) -> None:
        """Shows a rate in the bar, or a result above it (or on its own line)."""
        self._progress.update(self._task, completed=min(share, 1.0))
        if not text.startswith("iteration"):
            self._progress.update(self._task, rate=text)
        else:
            seconds = time.perf_counter() - self._start
            self._console.print(f"  {seconds:4.0f} s  {text}", soft_wrap=True)
