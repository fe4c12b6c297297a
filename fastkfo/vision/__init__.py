"""Few-shot vision under learn2learn's names: models, data sets, benchmarks, rotations."""

from fastkfo.vision import benchmarks, datasets, models, transforms

__all__ = ["benchmarks", "datasets", "models", "transforms"]
