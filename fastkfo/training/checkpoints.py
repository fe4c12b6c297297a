"""Checkpoints: written whole or not at all, and read without running anything that is in them."""

from __future__ import annotations

import io
import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastkfo._version import __version__

__all__ = ["FORMAT", "CheckpointError", "load_checkpoint", "save_checkpoint", "write_whole"]

FORMAT = 1
_KEYS = {
    "format",
    "fastkfo",
    "config",
    "iteration",
    "learner",
    "features",
    "optimizer",
    "tasks",
    "random",
    "validation",
    "skipped",
    "loss",
}


class CheckpointError(ValueError):
    """A checkpoint cannot be used, and why."""


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Writes a checkpoint; whoever is interrupted leaves the previous one.

    The new file is written beside the old one, reaches the disk, and then takes its name in one
    step of the file system.

    Args:
        path: The file.
        state: What `load_checkpoint` will return, without format and version.
    """
    data = io.BytesIO()  # torch.save's own errors on a full disk do not say that it is one
    torch.save(_stamped(state), data)
    write_whole(Path(path), lambda file: file.write(data.getbuffer()))


def write_whole(path: Path, write: Any) -> None:
    """Replaces a file by what ``write(file)`` writes, all of it or nothing.

    Args:
        path: The file.
        write: Called with a binary file.

    Raises:
        OSError: It cannot be written, whose name is in the error; the old file is as it was.
    """
    # mkstemp's name is new: what a killed process left behind is not written to.
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(number, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.strerror and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from None  # a disk that is full
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)


def remove_partial(folder: Path) -> None:
    """Removes what killed writes have left in a folder."""
    for left in folder.glob(".*.partial"):
        left.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint, onto the CPU, with ``weights_only=True``.

    Args:
        path: The file, or the run folder (then ``last.pt`` in it).

    Returns:
        Its content: ``format``, ``fastkfo`` (the version), ``config``, ``iteration``, state dicts
        of ``learner``, ``features`` and ``optimizer``, the samplers' states ``tasks``, all other
        ``random`` states, the ``validation`` so far, ``skipped`` iterations, the last ``loss``.

    Raises:
        CheckpointError: If there is none, it is cut off, damaged (a bit is enough) or none of
            fastkfo's, it would run code, or a newer fastkfo wrote it.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / "last.pt"
    if not path.is_file():
        raise CheckpointError(f"checkpoint: expected a file, got {path}, which is not there")
    begins_as_zip = _begins_as_zip(path)
    if zipfile.is_zipfile(path) and not _sums_are_right(path):  # torch.load does not look at them
        raise CheckpointError(f"checkpoint: {path} is damaged")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"checkpoint: {path} {_what_is_wrong(path, begins_as_zip, error)}"
        ) from None
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise CheckpointError(f"checkpoint: {path} can be read, but fastkfo did not write it")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"checkpoint: {path} has format {state['format']}, written by fastkfo "
            f"{state.get('fastkfo')}; fastkfo {__version__} reads up to format {FORMAT}"
        )
    if missing := sorted(_KEYS - set(state)):
        raise CheckpointError(f"checkpoint: {path} lacks {', '.join(missing)}")
    return state


def load_weights(module: torch.nn.Module | None, state: Any, what: str) -> None:
    """Loads a state dict, or says in what the two differ and changes nothing.

    Args:
        module: The module, or None.
        state: Its state dict, or None.
        what: The module's name, for the message.

    Raises:
        CheckpointError: If names, shapes or dtypes differ.
    """
    own = {} if module is None else module.state_dict()
    given = state if isinstance(state, Mapping) else {}
    wrong = [f"lacks {name}" for name in own if name not in given]
    wrong += [f"has {name}, which is not there" for name in given if name not in own]
    wrong += [
        f"has {name} {_shape(given[name])} for {_shape(own[name])}"
        for name in own
        if name in given and _shape(own[name]) != _shape(given[name])
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"checkpoint: another architecture, the {what} in it {'; '.join(wrong[:3])}{more}"
        )
    if module is not None:
        module.load_state_dict(given)


def _stamped(state: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "fastkfo": __version__, **state}


def _shape(tensor: Any) -> str:
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _what_is_wrong(path: Path, begins_as_zip: bool, error: Exception) -> str:
    """What torch.load's exception means; a damaged file can raise almost anything."""
    whole = zipfile.is_zipfile(path)
    if begins_as_zip and not whole:
        return "is cut off or damaged"
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
        if whole:
            return "holds more than tensors and plain values; it could run code, so it is not read"
        return "is no checkpoint, or could run code: it is not read"
    return "is damaged" if whole else "is no checkpoint"


def _sums_are_right(path: Path) -> bool:
    """Whether every part of a zip has its checksum."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # a damaged directory can raise almost anything, too
        return False


def _begins_as_zip(path: Path) -> bool:
    """Whether a file begins as those of torch.save do.

    Returns:
        Whether it does.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(2) == b"PK"
    except OSError as error:
        raise CheckpointError(f"checkpoint: {path} cannot be read: {error.strerror}") from None


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
