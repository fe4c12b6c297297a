"""`fastkfo bench`, or `python -m bench`: what is measured, beside whom, into which record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

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
from bench.workloads import METHODS, WORKLOADS

console = Console()
if not console.is_terminal:
    console = Console(width=130)  # a file or a pipe is as wide as it is written
QUICK_MINUTES = 4.5  # ends within five: the last row may be a little late
SECONDS_PER_ROW = 60.0
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def bench(
    every: Annotated[bool, typer.Option("--all", help="Every workload with every method.")] = False,
    readme: Annotated[bool, typer.Option("--readme", help="What the README quotes.")] = False,
    workload: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(WORKLOADS)}; repeatable.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(METHODS)}; repeatable.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(NAMES)}; repeatable. learn2learn is always there."),
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

    Without options: a five-minute selection, of learn2learn, fastkfo, the reference, vmap and JAX.
    The record goes to RESULTS/<machine>/<name>.json, after every row.
    """
    with _told_in_a_line():
        names = list(dict.fromkeys([ORACLE, *(peer or BY_DEFAULT)]))  # ratios are to the first
        for one in names:
            peer_named(one)
        if reason := peer_named(ORACLE).missing():
            raise ValueError(f"{ORACLE}: without it nothing can be checked. {reason}")
        _check(device, dtype, sweep)
        sizes = {"tasks": tasks, "steps": steps, "width": width}
        place = {"dtype": DTYPES[dtype], "device": device}
        which, problems = _problems(
            every, readme, bool(sweep), _once(workload), _once(method), **sizes, **place
        )
        if minutes is None:
            quick = which == "quick"
            minutes = QUICK_MINUTES if quick else len(problems) * SECONDS_PER_ROW / 60
        record = Record(results / machine.name(device) / f"{name or which}.json")
    try:
        for run in range(runs):
            _run(run, problems, names, sweep, minutes, record)
    except KeyboardInterrupt:
        kept = f"{record.rows} finished row(s) are in" if record.rows else "nothing was written to"
        console.print(f"interrupted: {kept} {record.path}")
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
    rows: list[dict[str, Any]] = []
    try:
        with _progress(len(problems)) as (tell, step):
            tell("ceilings of this machine")
            rates = ceilings.measure(device)
            record.begin(environment=machine.environment(device), ceilings=rates, sweep=sweep)
            for done, problem in enumerate(problems):
                left = until - time.monotonic()
                if left <= 0:
                    console.print(f"run {run + 1}: out of time before {problem.label}")
                    continue
                share = left / (len(problems) - done)
                if sweep:
                    _sweep(problem, sweep, names, time.monotonic() + share, tell, record, rows)
                else:
                    rows.append(read(problem, names, share, rates, tell))
                    record.add(rows[-1])
                step()
            tell("done")
        if len(rows) == len(problems):
            record.end()
    finally:  # an interrupted run shows what it has
        if rows:
            console.print(scaling.table(rows) if sweep else table.problems(rows, console.width))
        for line in () if sweep else table.remarks(rows):
            console.print(line, highlight=False)


def _sweep(
    problem: Problem,
    axis: str,
    names: list[str],
    until: float,
    tell: Tell,
    record: Record,
    rows: list[dict[str, Any]],
) -> None:
    """One row, on disk after each of its points."""
    for number, row in enumerate(scaling.read(problem, axis, names, until, tell)):
        if number == 0:
            rows.append(row)
            record.add(row)
        else:
            record.replace(row)


def _problems(
    every: bool, readme: bool, sweep: bool, workloads: list[str], methods: list[str], **sizes: Any
) -> tuple[str, list[Problem]]:
    """The record's own name, and what is in it.

    Raises:
        ValueError: Selections are combined, or a name is unknown.
    """
    if (every or readme) and (workloads or methods or (every and readme)):
        raise ValueError("--all, --readme: expected one of them, without --workload or --method")
    if readme:
        return selection.README, selection.quoted(**sizes)
    if every or sweep or workloads or methods:
        return "all" if every else "last", selection.chosen(workloads, methods, **sizes)
    return "quick", selection.quick(**sizes)


def _once(names: list[str] | None) -> list[str]:
    return list(dict.fromkeys(names or []))


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

        def tell(text: str) -> None:
            progress.update(bar, description=text)
            if not console.is_terminal:  # there a bar shows nothing until the end
                console.print(text, highlight=False)

        yield tell, lambda: progress.advance(bar)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(bench)
    app(prog_name="fastkfo bench")
