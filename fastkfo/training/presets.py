"""Presets: what Meta-KFO's own scripts train with."""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS", "preset"]

_SCRIPTS: dict[str, Any] = {
    "ways": 5,
    "shots": 5,
    "queries": 5,
    "steps": 5,
    "meta_batch": 16,
}
_CIFAR_FS: dict[str, Any] = {
    **_SCRIPTS,
    "dataset": "cifar-fs",
    "backbone": "mean-2x32",
    "fast_lr": 0.1,
    "iterations": 20_000,
}
_MINI_IMAGENET: dict[str, Any] = {**_SCRIPTS, "dataset": "mini-imagenet"}

#: Options by the preset's name; `adapt_transform` is on by default for these methods.
PRESETS: dict[str, dict[str, Any]] = {
    "maml-cfs": {**_CIFAR_FS, "method": "maml-kfo", "meta_lr": 0.0005},
    "anil-cfs": {**_CIFAR_FS, "method": "anil-kfo", "meta_lr": 0.001},
    "maml-mi": {
        **_MINI_IMAGENET,
        "method": "maml-kfo",
        "backbone": "pool-4x32",
        "fast_lr": 0.001,
        "meta_lr": 0.0005,
        "iterations": 20_000,
    },
    "anil-mi": {
        **_MINI_IMAGENET,
        "method": "anil-kfo",
        "backbone": "pool-4x64",
        "fast_lr": 0.05,
        "meta_lr": 0.001,
        "iterations": 3_500,
    },
}


def preset(name: str) -> dict[str, Any]:
    """The options of a preset.

    Args:
        name: One of ``PRESETS``.

    Returns:
        Fields of a `TrainConfig` by name.

    Raises:
        ValueError: If the name is unknown.

    Source:
        https://github.com/Sha-Lab/kfo, the scripts of S. Arnold, S. Iqbal, F. Sha, "When MAML Can
        Adapt Fast and How to Assist When It Cannot", AISTATS 2021.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return dict(PRESETS[name])
