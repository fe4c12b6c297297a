"""``fastkfo bench``: hands over to the benchmarks, which are in the repository alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

import fastkfo

__all__ = ["bench"]


def bench(context: typer.Context) -> None:
    """Times meta-gradients beside learn2learn, vmap, JAX and others, and checks each first.

    Runs in a checkout of the repository (an editable install); ``fastkfo bench --help`` lists the
    options.

    Raises:
        Exit: With 1 and a message if there is no checkout.
    """
    root = Path(fastkfo.__file__).resolve().parent.parent
    if not (root / "bench" / "__main__.py").is_file():
        typer.echo(
            "fastkfo: the benchmarks are not part of the installed package. Clone the repository "
            "and run `make bench` there.",
            err=True,
        )
        raise typer.Exit(1)
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    # Not with the root as its folder: paths given are relative to the user's.
    words = [sys.executable, "-m", "bench", *context.args]
    os.execve(sys.executable, words, os.environ | {"PYTHONPATH": path})
