"""The ``fastkfo`` command; needs the ``demo`` or ``train`` extra."""

from __future__ import annotations

import sys

__all__ = ["main"]

_EXTRA = ("matplotlib", "rich", "sklearn", "typer")
_TRAINING = ("train", "evaluate")


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
        extra = "train" if sys.argv[1:2] and sys.argv[1] in _TRAINING else "demo"
        print(
            f"fastkfo: the command needs {missing!r}, which is not installed. It is part of the "
            f"{extra} extra: pip install --no-build-isolation '.[{extra}]'",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    app()
