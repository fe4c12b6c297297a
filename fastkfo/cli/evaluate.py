"""``fastkfo evaluate``: a trained learner on unseen tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastkfo import training
from fastkfo.cli.errors import ending_with, ending_without_memory
from fastkfo.cli.interrupts import Interrupts
from fastkfo.training.checkpoints import write_whole

__all__ = ["evaluate"]


def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint, or a run folder: then its best one.")
    ],
    tasks: Annotated[int, typer.Option(help="Test tasks.", min=2)] = 600,
    steps: Annotated[
        int | None,
        typer.Option(help="Inner steps; default: those of the training.", min=1),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where; default: as the training.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the tasks; default: as the training.", min=0)
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(help="Folder of the data sets; default: as the training."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the scores to this file.")
    ] = None,
) -> None:
    """Adapts a trained learner to test tasks; prints its score before and after, with intervals.

    An interval is mean ± 1.96 s / √n over the tasks.

    Raises:
        BadParameter: If the file to write is in no folder.
        Exit: With 2 if an option cannot be used, 1 for what is missing or damaged, 130 after
            Ctrl-C, 143 after SIGTERM.
    """
    console = Console(highlight=False)
    with (
        Interrupts() as interrupts,
        ending_without_memory(),
        ending_with(2, TypeError, ValueError),
        ending_with(1, training.CheckpointError, OSError, ModuleNotFoundError),
    ):
        if json_file is not None and not json_file.parent.is_dir():
            raise typer.BadParameter(
                f"expected a file in a folder that is there, got {json_file}", param_hint="--json"
            )
        found = training.evaluate(
            checkpoint,
            tasks=tasks,
            steps=steps,
            device=device,
            seed=seed,
            root=root,
            stop=lambda: interrupts.signal is not None,
        )
    console.print(f"before adaptation  {found.metric} {found.before_text()}")
    console.print(f"after {found.steps} steps      {found}")
    console.print(f"{found.tasks} test tasks, {found.seconds:.1f} s", style="dim")
    if found.not_finite:
        console.print(f"{found.not_finite} tasks with a loss that is not finite")
    if json_file is not None:
        text = json.dumps(found.to_mapping(), indent=1, allow_nan=False) + "\n"
        with ending_with(1, OSError):
            write_whole(json_file, lambda file: file.write(text.encode()))
    if interrupts.exit_code:
        raise typer.Exit(interrupts.exit_code)
