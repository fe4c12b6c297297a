"""What may be asked of a run that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastkfo.training.checkpoints import CheckpointError
from fastkfo.training.config import TrainConfig, check_keys

__all__ = ["MAY_CHANGE", "continued"]

#: What may differ between a checkpoint's config and that of the run that goes on from it.
MAY_CHANGE = (
    "iterations", "validate_every", "checkpoint_every", "test_tasks", "patience", "root",
    "download", "device", "tensorboard", "wandb",
)  # fmt: skip


def continued(path: Path, config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The config of a run that goes on, in the folder where its checkpoint lies.

    Args:
        path: The checkpoint, or its folder.
        config: That of the checkpoint.
        changes: Options for the rest of the run.

    Returns:
        The config.

    Raises:
        CheckpointError: If an option differs that would make it another run.
        ValueError: If an option is unknown or cannot be used.
    """
    check_keys(changes, "changes")
    folder = path if path.is_dir() else path.parent
    had = {"out": str(folder)}
    for name, value in changes.items():
        before = had.get(name, getattr(config, name))
        if name not in MAY_CHANGE and not _same(name, before, value):
            raise CheckpointError(
                f"{name}: the run in {path} was begun with {before!r}, got {value!r}; "
                f"only {', '.join(MAY_CHANGE)} may change"
            )
    may = {name: value for name, value in changes.items() if name in MAY_CHANGE}
    return config.changed(**had, **may)


def _same(name: str, before: Any, value: Any) -> bool:
    """Whether an option is as it was; what was left open then is settled by now."""
    if name == "out":
        return Path(before).resolve() == Path(value or before).expanduser().resolve()
    return value == before or value is None or (name, value) == ("backbone", "auto")
