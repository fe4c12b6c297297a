"""Errors as messages, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

__all__ = ["ending_with"]


@contextmanager
def ending_with(code: int, *errors: type[Exception]) -> Iterator[None]:
    """Turns exceptions of a block into a message on stderr and an exit code.

    Args:
        code: The exit code.
        errors: Which exceptions.

    Yields:
        Nothing.

    Raises:
        Exit: If one came.
    """
    try:
        yield
    except errors as error:
        typer.echo(f"fastkfo: {error}", err=True)
        raise typer.Exit(code) from None
