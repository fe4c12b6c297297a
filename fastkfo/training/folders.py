"""The folder of a run: what is in it, and who may write there."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from fastkfo.training.checkpoints import remove_partial

__all__ = ["check_free", "make_ready"]

FILES = ("config.toml", "last.pt", "best.pt", "metrics.jsonl", "result.json", "wandb-id")


def check_free(folder: Path) -> None:
    """Raises if a folder holds a run.

    Raises:
        ValueError: It does, or it is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: expected a folder, got the file {folder}")
    if held := [name for name in FILES if (folder / name).exists()]:
        raise ValueError(
            f"out: {folder} already holds a run ({', '.join(held)}); resume or overwrite it, or "
            "choose another folder"
        )


def make_ready(folder: Path, *, resumed: bool) -> None:
    """Makes a folder that can be written to; of a run that begins, without an older one's files.

    Args:
        folder: The folder.
        resumed: Whether its run goes on.

    Raises:
        ValueError: If nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"out: expected a folder that can be written to, got {str(folder)!r}: {error.strerror}"
        ) from None
    remove_partial(folder)
    if not resumed:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
