"""``fastkfo train``: from a data set to a trained learner in a run folder."""

from __future__ import annotations

import inspect
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from fastkfo.cli.errors import ending_with, ending_without_memory
from fastkfo.cli.interrupts import Interrupts
from fastkfo.cli.train_display import Display
from fastkfo.training import (
    DATASETS,
    METHODS,
    PRESETS,
    CheckpointError,
    Diverged,
    Result,
    TrainConfig,
    Trainer,
    from_mapping,
    preset,
    read_config,
)
from fastkfo.training.backbones import BACKBONES

__all__ = ["TrainCommand", "train"]

_NAMES = {
    "method": [f"One of {', '.join(METHODS)}."],
    "dataset": [f"Names: {', '.join(DATASETS)}."],
    "backbone": [f"Else KIND-SIZES: mlp-40x40, or BLOCKSxCHANNELS of {', '.join(BACKBONES)}."],
}
LAST = "."  # --resume without a path: the run folder's own last checkpoint


def train(**options: Any) -> None:
    """Meta-trains a learner, validates it, keeps the best, and tests it.

    Options come from --preset, then --config, then the command line, the later over the earlier.
    Ctrl-C or SIGTERM ends it with a checkpoint, from which --resume goes on; a second one ends it
    at once.

    Args:
        options: The fields of a `TrainConfig`, and config, preset, resume and overwrite.

    Raises:
        BadParameter: If --overwrite stands beside --resume.
        Exit: With 2 if an option cannot be used, 1 for what is missing or damaged and for a
            training that diverged, 130 after Ctrl-C, 143 after SIGTERM.
    """
    console = Console(highlight=False)
    file, name = options.pop("config"), options.pop("preset")
    resume, overwrite = options.pop("resume"), options.pop("overwrite")
    with ending_with(2, TypeError, ValueError), ending_with(1, ModuleNotFoundError):
        given = _given(file, name, options)
        wanted = from_mapping(given, "options")
    if resume is not None and overwrite:
        raise typer.BadParameter("expected no --resume beside it", param_hint="--overwrite")
    with Interrupts() as interrupts:

        def stop() -> bool:
            return interrupts.signal is not None

        with Display(console) as display, ending_without_memory():
            with (
                ending_with(2, TypeError, ValueError),
                ending_with(1, CheckpointError, OSError, ModuleNotFoundError),
            ):
                if resume is None:
                    trainer = Trainer(wanted, overwrite=overwrite, watch=display, stop=stop)
                else:
                    path = wanted.folder if resume == LAST else Path(resume)
                    trainer = Trainer.resume(path, watch=display, stop=stop, **given)
            display.begin(trainer)
            with ending_with(1, Diverged, OSError, ValueError, CheckpointError):
                result = trainer.run()
        _report(console, result, interrupts)
    if interrupts.exit_code and result.interrupted:
        raise typer.Exit(interrupts.exit_code)


class TrainCommand(TyperCommand):
    """Lets ``--resume`` stand without a path."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Gives a ``--resume`` that no path follows one, then parses.

        Args:
            ctx: The context.
            args: The words.

        Returns:
            What is left of them.
        """
        words = list(args)
        for i, (word, following) in enumerate(zip(args, [*args[1:], "--"], strict=True)):
            if word == "--resume" and following.startswith("--"):
                words[i] = f"--resume={LAST}"
        return super().parse_args(ctx, words)


def _given(file: Path | None, name: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The fields that were given anywhere, the command line last."""
    return {
        **(preset(name) if name is not None else {}),
        **(read_config(file) if file is not None else {}),
        **{key: value for key, value in options.items() if value is not None},
    }


def _report(console: Console, result: Result, interrupts: Interrupts) -> None:
    if result.interrupted:
        signal = "" if interrupts.signal is None else f"{interrupts.signal.name}: "
        console.print(
            f"{signal}stopped after iteration {result.iteration}; "
            f"--resume {result.folder} goes on from there",
            soft_wrap=True,
        )
    if result.skipped:
        console.print(f"{result.skipped} iterations without a step: not finite")
    if result.test is not None:
        test = result.test
        console.print(
            f"test: {test} after {test.steps} steps, {test.before_text()} before, "
            f"{test.tasks} tasks",
            soft_wrap=True,
        )
    console.print(f"Run folder: {result.folder}", soft_wrap=True)


def _option(each: Field[Any]) -> inspect.Parameter:
    """A field as an option of the command; None, if it is not given."""
    kind = {"str": str, "int": int, "float": float, "bool": bool}[str(each.type).split(" ")[0]]
    flag = each.name.replace("_", "-")
    names = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
    default = str(each.default) if each.default not in ("", None) else False
    text = " ".join([each.metadata["help"], *_NAMES.get(each.name, ())])
    info = typer.Option(names, help=text, show_default=default)
    return _parameter(each.name, Annotated[kind | None, info], None)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


# typer reads a function's signature: the command's is that of the config, and these four.
_PARAMETERS = [
    *[_option(each) for each in fields(TrainConfig)],
    _parameter(
        "preset",
        Annotated[
            str | None,
            typer.Option(help=f"What Meta-KFO's scripts train with: {', '.join(PRESETS)}."),
        ],
        None,
    ),
    _parameter(
        "config",
        Annotated[Path | None, typer.Option(help="YAML or TOML file of options.")],
        None,
    ),
    _parameter(
        "resume",
        Annotated[
            str | None,
            typer.Option(
                metavar="[PATH]",
                help="Go on from a checkpoint or run folder; without a path, from that of --out.",
            ),
        ],
        None,
    ),
    _parameter(
        "overwrite",
        Annotated[bool, typer.Option("--overwrite", help="Remove a run that is in the folder.")],
        False,
    ),
]
train.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]
train.__annotations__ = {each.name: each.annotation for each in _PARAMETERS}
