"""``fastkfo reproduce``: the paper's illustrative results, as figures and a table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn

from fastkfo.cli.bar import Barred
from fastkfo.cli.demo_report import write_json
from fastkfo.cli.errors import ending_with
from fastkfo.cli.interrupts import Interrupts
from fastkfo.cli.out_folder import check_writable
from fastkfo.cli.reproduce_jobs import cores, run
from fastkfo.cli.reproduce_plot import write_figures
from fastkfo.cli.reproduce_problems import PROBLEMS, QUICK_ITERATIONS, quick
from fastkfo.cli.reproduce_report import FIGURES, record, report
from fastkfo.cli.reproduce_rows import as_csv, as_markdown, rows, tables
from fastkfo.cli.reproduce_surface import surface
from fastkfo.tasks import DigitTasks

__all__ = ["FILES", "reproduce"]

FILES = ("report.md", "table.md", "table.csv", "results.json", *FIGURES)


def reproduce(
    out: Annotated[Path, typer.Option(help="Folder for the report, tables and figures.")] = Path(
        "fastkfo-reproduce"
    ),
    seeds: Annotated[int, typer.Option(help="Seeds, from 0.", min=1)] = 10,
    processes: Annotated[
        int, typer.Option(help="At once, one thread each; 0: one per core.", min=0)
    ] = 0,
    is_quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help=f"{QUICK_ITERATIONS} meta-iterations: seconds, and no number means anything.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier result in the folder.")
    ] = False,
) -> None:
    """Compares MAML on shallow and deep linear models, and Meta-KFO, as the paper does.

    Linear regression, binary classification, the loss surface of two factors, and digits; every
    method's inner learning rate is chosen by validation among the same ones. Writes a report, a
    table (Markdown, CSV, JSON) and four figures.

    Raises:
        BadParameter: If the folder cannot be written to, or is not empty: an earlier result is
            replaced with --overwrite, and nothing else is.
        Exit: With 1 if scikit-learn is missing; 130 after Ctrl-C, 143 after SIGTERM. Nothing is
            written then.
    """
    check_writable(out, FILES)
    _check_free(out, overwrite)
    with ending_with(1, ModuleNotFoundError):
        DigitTasks()
    problems = tuple(quick(p) for p in PROBLEMS) if is_quick else PROBLEMS
    processes = processes or cores()
    console = Console(highlight=False)
    start = time.perf_counter()
    with Interrupts() as interrupts, _Display(console) as display:
        done = run(problems, seeds, processes, lambda: interrupts.signal is None, display.notify)
    if interrupts.signal is not None:
        console.print(f"{interrupts.signal.name}: nothing was written.")
        raise typer.Exit(interrupts.exit_code)
    drawn = surface(next(p for p in problems if p.name == "line"), seeds)
    about = {
        "seeds": seeds,
        "quick": is_quick,
        "processes": processes,
        "wall_seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(sum(d.seconds for d in done), 1),
    }
    found = rows(problems, done)
    for table in tables(problems, found):
        console.print(table, "", crop=False)
    (out / "table.csv").write_text(as_csv(found), encoding="utf-8")
    (out / "table.md").write_text(as_markdown(problems, found), encoding="utf-8")
    (out / "report.md").write_text(report(problems, found, about), encoding="utf-8")
    write_json(out / "results.json", record(problems, done, found, drawn, about))
    write_figures(out, problems, done, drawn)
    if is_quick:
        console.print("A quick run: no number means anything.", style="dim")
    console.print(f"Wrote {out / 'report.md'}, tables and figures", soft_wrap=True)


class _Display(Barred):
    """A progress bar on a terminal; elsewhere a line for every twentieth of the work."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            console,
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.description}"),
        )
        self._task = self._progress.add_task("starting", total=1.0)
        self._start, self._shown = time.perf_counter(), 0

    def notify(self, share: float, text: str) -> None:
        """Shows what was done last."""
        self._progress.update(self._task, completed=share, description=text)
        if not self._console.is_terminal and int(20 * share) > self._shown:
            self._shown = int(20 * share)
            seconds = time.perf_counter() - self._start
            self._console.print(f"  {seconds:4.0f} s  {100 * share:3.0f} %  {text}", soft_wrap=True)


def _check_free(out: Path, overwrite: bool) -> None:
    """Raises unless the folder is empty, or holds an earlier result that may be replaced."""
    if not any(out.iterdir()):
        return
    if not (out / "results.json").exists():
        raise typer.BadParameter(
            f"expected an empty folder or one with an earlier result, got {str(out)!r}, which "
            "has other files",
            param_hint="--out",
        )
    if not overwrite:
        raise typer.BadParameter(
            f"{str(out)!r} already holds a result; replace it with --overwrite, or choose another "
            "folder",
            param_hint="--out",
        )
