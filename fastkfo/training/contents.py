"""What a checkpoint must hold beside its weights, checked before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastkfo.training.checkpoints import CheckpointError

__all__ = ["check_contents"]


def check_contents(state: Mapping[str, Any], optimizer: torch.optim.Adam) -> None:
    """Raises unless counts, scores and Adam's state are such as a training leaves them.

    Args:
        state: Of `load_checkpoint`.
        optimizer: A new one of the same learner.

    Raises:
        CheckpointError: Something is of another type, shape or range.
    """
    done = _count(state["iteration"], "iteration")
    validation = _keys(
        state["validation"], "validation", "best", "best_iteration", "last_iteration"
    )
    best, at = validation["best"], validation["best_iteration"]
    last = _count(validation["last_iteration"], "validation.last_iteration", done)
    _count(at, "validation.best_iteration", last)
    if best is not None and (not isinstance(best, float) or best != best or at == 0):
        _wrong("validation.best", "a float, and its iteration", best)
    skipped = _keys(state["skipped"], "skipped", "all", "in_a_row")
    total = _count(skipped["all"], "skipped.all", done)
    _count(skipped["in_a_row"], "skipped.in_a_row", total)
    if not isinstance(state["loss"], float):
        _wrong("loss", "a float", state["loss"])
    _check_adam(state["optimizer"], optimizer, done - total)


def _check_adam(given: Any, optimizer: torch.optim.Adam, steps: int) -> None:
    own = optimizer.state_dict()["param_groups"]
    _keys(given, "optimizer", "state", "param_groups")
    groups, state = given["param_groups"], given["state"]
    if not isinstance(groups, list) or len(groups) != 1:
        _wrong("optimizer.param_groups", "one", groups)
    group = _keys(groups[0], "optimizer.param_groups", "lr", "betas", "eps", "params")
    for name, value in own[0].items():
        if name in group and group[name] != value:  # another PyTorch's may have other names
            _wrong(f"optimizer {name}", repr(value), group[name])
    parameters = optimizer.param_groups[0]["params"]
    numbers = list(range(len(parameters))) if steps else []
    if not isinstance(state, Mapping) or sorted(state, key=str) != sorted(numbers, key=str):
        _wrong("optimizer.state", f"that of {len(numbers)} parameters after {steps} steps", state)
    for number in numbers:
        name = f"optimizer.state[{number}]"
        each = _keys(state[number], name, "step", "exp_avg", "exp_avg_sq")
        for key in ("exp_avg", "exp_avg_sq"):
            if _kind(each[key]) != _kind(parameters[number]):
                _wrong(f"{name}.{key}", _kind(parameters[number]), _kind(each[key]))
        step = each["step"]
        if not isinstance(step, torch.Tensor) or step.numel() != 1 or step.item() != steps:
            _wrong(f"{name}.step", str(steps), step)


def _keys(value: Any, name: str, *keys: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not set(keys) <= set(value):
        _wrong(name, f"{', '.join(keys)} by name", value)
    found: Mapping[str, Any] = value
    return found


def _count(value: Any, name: str, most: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        _wrong(name, "an int of at least 0", value)
    if most is not None and value > most:
        _wrong(name, f"at most {most}", value)
    return int(value)


def _kind(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _wrong(name: str, expected: str, got: Any) -> None:
    text = repr(got).partition("\n")[0]
    text = text if len(text) <= 60 else f"{text[:57]}..."
    raise CheckpointError(
        f"checkpoint: it does not go with this run: {name}: expected {expected}, got {text}"
    )
