"""What the benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from fastkfo.data.meta_dataset import MetaDataset
from fastkfo.data.transforms import ConsecutiveLabels, KShots, LoadData, NWays, RemapLabels
from fastkfo.data.utils import OnDeviceDataset

__all__ = ["Parts", "Sizes", "check_samples", "of_classes", "on_device", "refuse", "transforms_of"]

Three = tuple[Any, Any, Any]
Parts = tuple[Three, Three]


class Sizes(NamedTuple):
    """Ways and samples per class, of training and of the rest."""

    train_ways: int
    train_samples: int
    test_ways: int
    test_samples: int

    def of(self, part: int) -> tuple[int, int]:
        """Those of train (0), validation (1) or test (2)."""
        return self[:2] if part == 0 else self[2:]


def refuse(name: str, options: dict[str, Any]) -> None:
    """Raise if a benchmark was given an option that it does not have; None is no option."""
    given = [option for option, value in options.items() if value is not None]
    if given:
        raise TypeError(f"{name}: expected no further options, got {', '.join(sorted(given))}")


def on_device(
    dataset: Dataset[Any],
    device: torch.device | str | None,
    transform: Callable[[Any], Any] | None = None,
) -> MetaDataset:
    """Put a data set on a device, if one is given, and keep its books."""
    if device is not None:
        dataset = OnDeviceDataset(dataset, device=device, transform=transform)
    return MetaDataset(dataset)


def check_samples(dataset: MetaDataset, part: int, sizes: Sizes) -> None:
    """Raise unless every class of train (0), validation (1) or test (2) has enough samples.

    Raises:
        ValueError: If one has not.
    """
    _, samples = sizes.of(part)
    counts = {label: len(of) for label, of in dataset.labels_to_indices.items()}
    label = min(counts, key=counts.__getitem__)
    if samples > counts[label]:
        split = ("train", "validation", "test")[part]
        raise ValueError(
            f"{'test' if part else 'train'}_samples: expected at most {counts[label]}, the samples "
            f"of class {label} of the {split} split, got {samples}"
        )


def transforms_of(dataset: MetaDataset, part: int, sizes: Sizes) -> list[Any]:
    """How learn2learn draws tasks; in the validation set, labels are sorted first."""
    check_samples(dataset, part, sizes)
    ways, samples = sizes.of(part)
    last: list[Any] = [RemapLabels(dataset), ConsecutiveLabels(dataset)]
    order = last[::-1] if part == 1 else last
    return [NWays(dataset, ways), KShots(dataset, samples), LoadData(dataset), *order]


def of_classes(datasets: Sequence[MetaDataset], sizes: Sizes) -> Parts:
    """Return the data sets of a benchmark with the transforms that draw its tasks."""
    train, validation, test = datasets
    steps = [transforms_of(dataset, part, sizes) for part, dataset in enumerate(datasets)]
    return (train, validation, test), (steps[0], steps[1], steps[2])
