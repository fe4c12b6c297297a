"""The folder that a command leaves its results in."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import typer

__all__ = ["check_writable"]


def check_writable(out: Path, names: Iterable[str]) -> None:
    """Creates the folder and a file in it, so that a failure comes before the training.

    Args:
        out: The folder.
        names: Of the files that will be written, which may be there.

    Raises:
        typer.BadParameter: If the folder or one of the files cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        for name in names:
            if (out / name).exists():
                with (out / name).open("ab"):
                    pass
    except OSError as error:
        raise typer.BadParameter(
            f"expected a folder that can be written to, got {str(out)!r}: {error.strerror}",
            param_hint="--out",
        ) from None
