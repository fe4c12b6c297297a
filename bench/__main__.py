"""`fastkfo bench`, or `python -m bench`: what is measured, beside whom, into which record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import ceilings, machine, scaling, selection, table
from bench.peers import BY_DEFAULT, NAMES, ORACLE
from bench.peers import peer as peer_named
from bench.problem import Problem
from bench.records import RESULTS, Record
from bench.row import Tell, read

console = Console()
QUICK_MINUTES = 4.5  # ends within five: the last row may be a little late
SECONDS_PER_ROW = 60.0
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def bench(
    every: Annotated[bool, typer.Option("--all", help="Every workload with every method.")] = False,
    workload: Annotated[list[str] | None, typer.Option(help="A workload; repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="A method; repeatable.")] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(NAMES)}; repeatable. Default: the first five."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    tasks: Annotated[int | None, typer.Option(min=1, help="T instead of the workload's.")] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="K instead of the workload's.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Instead of the workload's.")] = None,
    sweep: Annotated[str | None, typer.Option(help="tasks, steps or width: how it scales.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="How often all of it, for the spread.")] = 1,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="No row is begun after this, per run.")
    ] = None,
    results: Annotated[
        Path, typer.Option(help="Where records go.", show_default="bench/results")
    ] = RESULTS,
    name: Annotated[str | None, typer.Option(help="The record's name.")] = None,
) -> None:
    """Measures meta-gradients side by side, and only those that are right.

    Without options: a five-minute selection against learn2learn, the plain reference, vmap and JAX.
    The record goes to RESULTS/<machine>/<name>.json, after every row.
    """
    with _told_in_a_line():
        names = list(peer or BY_DEFAULT)
        for one in names:
            peer_named(one)
        if reason := peer_named(ORACLE).missing():
            raise ValueError(f"{ORACLE}: without it nothing can be checked. {reason}")
        _check(device, dtype, sweep)
        sizes = {"tasks": tasks, "steps": steps, "width": width}
        place = {"dtype": DTYPES[dtype], "device": device}
        is_quick = not (every or workload or method or sweep)
        if is_quick:
            problems = selection.quick(**sizes, **place)
        else:
            problems = selection.chosen(workload or [], method or [], **sizes, **place)
        minutes = minutes or (QUICK_MINUTES if is_quick else len(problems) * SECONDS_PER_ROW / 60)
        default = "quick" if is_quick else "all" if every else "last"
        record = Record(results / machine.name(device) / f"{name or default}.json")
    try:
        for run in range(runs):
            _run(run, problems, names, sweep, minutes, record)
    except KeyboardInterrupt:
        console.print(f"interrupted: the finished rows are in {record.path}")
        raise typer.Exit(130) from None
    console.print(f"record: {record.path}")


def _run(
    run: int,
    problems: list[Problem],
    names: list[str],
    sweep: str | None,
    minutes: float,
    record: Record,
) -> None:
    """One pass over all problems, printed and recorded."""
    device = problems[0].device
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, for every peer
    until = time.monotonic() + 60 * minutes
    with _progress(len(problems)) as (tell, step):
        tell("ceilings of this machine")
        rates = ceilings.measure(device)
        record.begin(environment=machine.environment(device), ceilings=rates, sweep=sweep)
        rows = []
        for done, problem in enumerate(problems):
            left = until - time.monotonic()
            if left <= 0:
                console.print(f"run {run + 1}: out of time before {problem.label}")
                continue
            seconds = left / (len(problems) - done)
            if sweep:
                row = scaling.read(problem, sweep, names, seconds, rates, tell)
            else:
                row = read(problem, names, seconds, rates, tell)
            rows.append(row)
            record.add(row)
            step()
        if len(rows) == len(problems):
            record.end()
    console.print(scaling.table(rows) if sweep else table.problems(rows))


def _check(device: str, dtype: str, sweep: str | None) -> None:
    for what, value, values in (
        ("device", device, ("cpu", "cuda")),
        ("dtype", dtype, tuple(DTYPES)),
        ("sweep", sweep, (None, *scaling.AXES)),
    ):
        if value not in values:
            wanted = ", ".join(str(v) for v in values if v is not None)
            raise ValueError(f"{what}: expected one of {wanted}, got {value!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a machine with CUDA, got one where torch sees none")


@contextmanager
def _told_in_a_line() -> Iterator[None]:
    """What the user got wrong is a line, not a traceback."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@contextmanager
def _progress(rows: int) -> Iterator[tuple[Tell, Callable[[], None]]]:
    columns = (
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=rows)
        yield (
            lambda text: progress.update(bar, description=text),
            lambda: progress.advance(bar),
        )


if __name__ == "__main__":
    typer.run(bench)
