"""The folder of a run: what is in it, and who may write there."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastkfo.training.checkpoints import remove_partial

__all__ = ["check_free", "check_writable", "held", "mark"]

FILES = ("config.toml", "last.pt", "best.pt", "metrics.jsonl", "result.json", "wandb-id")


def check_free(folder: Path) -> None:
    """Raises if a folder holds a run.

    Raises:
        ValueError: It does.
    """
    if found := [name for name in FILES if (folder / name).exists()]:
        raise ValueError(
            f"out: {folder} already holds a run ({', '.join(found)}); resume or overwrite it, or "
            "choose another folder"
        )


def check_writable(folder: Path) -> None:
    """Raises if nothing can be written to a folder, or to where it would be made.

    Raises:
        ValueError: So it is.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out: expected a folder, got the file {folder}")
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(_not_writable(folder, error)) from None


@contextmanager
def held(folder: Path, *, resumed: bool, overwrite: bool) -> Iterator[None]:
    """Holds a folder that can be written to, against other trainings; makes it if need be.

    Of a run that begins, it is without an older one's files.

    Args:
        folder: The folder.
        resumed: Whether its run goes on.
        overwrite: Whether the run that is in it may be removed.

    Yields:
        Nothing.

    Raises:
        ValueError: If nothing can be written there, another training holds it, or there is a run.
    """
    check_writable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The file stays: who removed it would let two in, one with the old file, one with a new.
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ValueError(_not_writable(folder, error)) from None
    try:
        _take(lock, folder)
        if not resumed:
            if not overwrite:
                check_free(folder)
            _clear(folder)
        remove_partial(folder)
        yield
    finally:
        os.close(lock)  # the system lets go of it, also when the process is killed


def mark(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is written again; None without a file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _take(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"out: another training is running in {folder}") from None
    except OSError:
        pass  # a file system without locks; it is none the worse for trainings in turn


def _clear(folder: Path) -> None:
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def _not_writable(folder: Path, error: OSError) -> str:
    return f"out: expected a folder that can be written to, got {str(folder)!r}: {error.strerror}"
