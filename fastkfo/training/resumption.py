"""What may be asked of a run that goes on, and what its folder must hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastkfo.training.checkpoints import CheckpointError, load_checkpoint
from fastkfo.training.config import TrainConfig, check_keys, from_mapping, read_config
from fastkfo.training.evaluation import config_of
from fastkfo.training.sources import settled

__all__ = ["MAY_CHANGE", "as_given", "best_is_there", "checkpoint_of", "continued", "load_best"]

#: What may differ between a checkpoint's config and that of the run that goes on from it.
MAY_CHANGE = (
    "iterations", "validate_every", "checkpoint_every", "test_tasks", "patience", "root",
    "download", "tensorboard", "wandb",
)  # fmt: skip


def checkpoint_of(path: Path) -> Path:
    """The file that a run goes on from.

    Args:
        path: It, or the run folder.

    Returns:
        The file.

    Raises:
        CheckpointError: If it is another than the ``last.pt`` beside it: what came after it would
            be lost.
    """
    last = (path if path.is_dir() else path.parent) / "last.pt"
    if path.is_dir() or not path.exists() or not last.exists() or path.samefile(last):
        return last if path.is_dir() else path
    raise CheckpointError(
        f"checkpoint: expected {last}, from which that run goes on, got {path}; to go on from the "
        "latter instead, copy it to a folder of its own"
    )


def continued(
    path: Path, config: TrainConfig, iteration: Any, changes: Mapping[str, Any]
) -> TrainConfig:
    """The config of a run that goes on, in the folder where its checkpoint lies.

    Args:
        path: The checkpoint.
        config: That of the checkpoint.
        iteration: Iterations done.
        changes: Options for the rest of the run.

    Returns:
        The config.

    Raises:
        CheckpointError: If an option differs that would make it another run, or more iterations
            are done than are asked for.
        ValueError: If an option is unknown or cannot be used.
    """
    check_keys(changes, "changes")
    had = {"out": str(path.parent)}
    for name, value in changes.items():
        before = had.get(name, getattr(config, name))
        if name not in MAY_CHANGE and not _same(name, before, value):
            raise CheckpointError(
                f"{name}: the run in {path} was begun with {before!r}, got {value!r}; "
                f"only {', '.join(MAY_CHANGE)} may change"
            )
    may = {name: value for name, value in changes.items() if name in MAY_CHANGE}
    config = config.changed(**had, **may)
    if isinstance(iteration, int) and config.iterations < iteration:
        raise CheckpointError(
            f"iterations: expected at least {iteration}, which the run in {path} has done, got "
            f"{config.iterations}"
        )
    return config


def as_given(config: TrainConfig) -> TrainConfig:
    """The config of a run that goes on, with what was left open as its ``config.toml`` has it.

    Args:
        config: The same, settled.

    Returns:
        The config; as it is, if that file is not there or is no longer that of the run.
    """
    try:
        given = from_mapping(read_config(config.folder / "config.toml"))
        same = {name: getattr(config, name) for name in (*MAY_CHANGE, "out")}
        given = given.changed(**same)
        return given if settled(given) == config else config
    except (ModuleNotFoundError, TypeError, ValueError):
        return config


def load_best(config: TrainConfig, iteration: int) -> dict[str, Any]:
    """The checkpoint of a run's best validation.

    Args:
        config: Of the run.
        iteration: Where that was.

    Returns:
        Its content.

    Raises:
        CheckpointError: If it is not there, is damaged, or is another's.
    """
    path = config.folder / "best.pt"
    state = _load_own(path, config)
    if state["iteration"] != iteration:
        raise CheckpointError(
            f"checkpoint: expected {path} of iteration {iteration}, the best one, got that of "
            f"iteration {state['iteration']}"
        )
    return state


def best_is_there(config: TrainConfig, best: int, iteration: int) -> bool:
    """Whether ``best.pt`` is what a checkpoint says.

    Args:
        config: Of the run.
        best: The iteration of the best validation.
        iteration: That of the checkpoint.

    Returns:
        Whether it is; if it is not, the checkpoint is itself the best one, and a kill came before
        ``best.pt`` was written.

    Raises:
        CheckpointError: If it is not there, is damaged, or is another's.
    """
    if best != iteration:
        load_best(config, best)
        return True
    path = config.folder / "best.pt"
    return path.is_file() and _load_own(path, config)["iteration"] == best


def _load_own(path: Path, config: TrainConfig) -> dict[str, Any]:
    """A checkpoint of the same run, or what is wrong with it."""
    state = load_checkpoint(path)
    found, own = config_of(state).to_mapping(), config.to_mapping()
    for name in own | found:
        if name not in (*MAY_CHANGE, "out") and found.get(name) != own.get(name):
            raise CheckpointError(
                f"checkpoint: {path} is of another run, {name} in it is {found.get(name)!r}, "
                f"expected {own.get(name)!r}"
            )
    return state


def _same(name: str, before: Any, value: Any) -> bool:
    """Whether an option is as it was; what was left open then is settled by now."""
    if name == "out":
        return Path(before).resolve() == Path(value or before).expanduser().resolve()
    return value == before or value is None or (name, value) == ("backbone", "auto")
