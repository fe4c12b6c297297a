"""Errors as messages, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import typer

__all__ = ["ending_with", "ending_without_memory"]

# What PyTorch's RuntimeErrors say where a tensor is too large: of these there is no type.
_TOO_LARGE = ("allocate", "not enough memory", "Storage size calculation overflowed")


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


@contextmanager
def ending_without_memory() -> Iterator[None]:
    """Turns what a tensor beyond the memory raises into a message on stderr and exit code 1.

    Yields:
        Nothing.

    Raises:
        Exit: If a tensor was too large.
        MemoryError: Never; it ends.
        RuntimeError: Any that says something else.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        first = str(error).partition("\n")[0]  # frames of C++ follow
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not any(words in first for words in _TOO_LARGE):
            raise
        typer.echo(f"fastkfo: not enough memory: {first}", err=True)
        raise typer.Exit(1) from None
