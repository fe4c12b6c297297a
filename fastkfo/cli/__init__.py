"""The ``fastkfo`` command; needs the ``demo`` extra."""

from __future__ import annotations

import sys

__all__ = ["main"]

_EXTRA = ("matplotlib", "rich", "sklearn", "typer")


def main() -> None:
    """Runs the ``fastkfo`` command.

    Raises:
        SystemExit: With the command's exit code; 1 and a message if the extra is not installed.
        ModuleNotFoundError: If something else is missing.
    """
    try:
        from fastkfo.cli.app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        print(
            f"fastkfo: the command needs {missing!r}, which is not installed. It is part of the "
            "demo extra: pip install 'fastkfo[demo]'",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    app()
