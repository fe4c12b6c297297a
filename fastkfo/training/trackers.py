"""Where metrics go: a file of JSON lines, and TensorBoard or Weights & Biases where asked for."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fastkfo.training.checkpoints import write_whole
from fastkfo.training.config import TrainConfig

__all__ = ["JsonLines", "Tracker", "check_installed", "trackers"]


class Tracker(Protocol):
    """What metrics are given to."""

    def add(self, kind: str, iteration: int, values: Mapping[str, Any]) -> None:
        """Takes the metrics of one iteration; kind is train, validation or test."""

    def flush(self) -> None:
        """Makes what was added readable by others."""

    def close(self) -> None:
        """The last call."""


class JsonLines:
    """Appends one line of JSON per metric to a file.

    Args:
        path: The file.
        last: By kind, the last iteration whose lines stay; a run that is resumed computes what
            came after it again.
    """

    def __init__(self, path: Path, last: Mapping[str, int]) -> None:
        if path.is_file():
            kept = [line for line in path.read_bytes().splitlines(True) if _kept(line, last)]
            write_whole(path, lambda file: file.writelines(kept))
        self._file = path.open("a", encoding="utf-8")

    def add(self, kind: str, iteration: int, values: Mapping[str, Any]) -> None:
        """Adds a line; numbers that are not finite become null."""
        plain = {k: None if _not_finite(v) else v for k, v in values.items()}
        line = {"kind": kind, "iteration": iteration, **plain}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def flush(self) -> None:
        """Hands the lines to the system."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class _TensorBoard:
    def __init__(self, folder: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Of a run that is resumed, steps beyond this one are to be forgotten.
        self._writer: Any = SummaryWriter(str(folder), purge_step=iteration + 1)

    def add(self, kind: str, iteration: int, values: Mapping[str, Any]) -> None:
        for name, value in _numbers(values).items():
            self._writer.add_scalar(f"{kind}/{name}", value, iteration)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, config: TrainConfig) -> None:
        import wandb

        self._run: Any = wandb.init(
            project="fastkfo",
            dir=str(folder),
            name=folder.name,
            id=_identity(folder),
            resume="allow",
            config=config.to_mapping(),
        )

    def add(self, kind: str, iteration: int, values: Mapping[str, Any]) -> None:
        named = {f"{kind}/{name}": value for name, value in _numbers(values).items()}
        self._run.log(named, step=iteration)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


def check_installed(config: TrainConfig) -> None:
    """Raises unless the trackers that a config asks for are installed.

    Raises:
        ModuleNotFoundError: One is not.
    """
    for name, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb)):
        if wanted and importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"{name}: expected it to be installed, since it was asked for: pip install {name}",
                name=name,
            )


def trackers(config: TrainConfig, folder: Path, iteration: int, validated: int) -> list[Tracker]:
    """Opens the trackers that a config asks for.

    Args:
        config: Says which.
        folder: The run folder, which is there.
        iteration: Where the run begins or goes on.
        validated: The last iteration that was validated.

    Returns:
        The trackers; the first is ``metrics.jsonl``.
    """
    last = {"train": iteration, "validation": validated}  # a test is of a run that has ended
    found: list[Tracker] = [JsonLines(folder / "metrics.jsonl", last)]
    if config.tensorboard:
        found.append(_TensorBoard(folder / "tensorboard", iteration))
    if config.wandb:
        found.append(_Wandb(folder, config))
    return found


def _identity(folder: Path) -> str:
    """The same for every resumption of a run."""
    file = folder / "wandb-id"
    if not file.is_file():
        import secrets

        file.write_text(secrets.token_hex(8))
    return file.read_text().strip()


def _kept(line: bytes, last: Mapping[str, int]) -> bool:
    """Whether a line is whole and of an iteration that stays."""
    try:
        values = json.loads(line)
        return line.endswith(b"\n") and values["iteration"] <= last.get(values["kind"], -1)
    except (ValueError, KeyError, TypeError):
        return False


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in values.items() if isinstance(v, int | float)}
