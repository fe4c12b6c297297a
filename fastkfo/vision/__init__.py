"""Few-shot vision under learn2learn's names: models, data sets, benchmarks, rotations.

All but the models are imported when they are first used.
"""

from typing import TYPE_CHECKING

from fastkfo.vision import models

if TYPE_CHECKING:
    from types import ModuleType

    from fastkfo.vision import benchmarks, datasets, transforms

__all__ = ["benchmarks", "datasets", "models", "transforms"]


def __getattr__(name: str) -> "ModuleType":
    if name in ("benchmarks", "datasets", "transforms"):
        import importlib

        return importlib.import_module(f"fastkfo.vision.{name}")
    raise AttributeError(f"module 'fastkfo.vision' has no attribute {name!r}")
