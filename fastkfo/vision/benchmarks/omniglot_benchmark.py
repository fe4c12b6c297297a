"""The Omniglot benchmark."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from fastkfo.data.meta_dataset import FilteredMetaDataset, MetaDataset
from fastkfo.data.transforms import ConsecutiveLabels, FusedNWaysKShots, LoadData, RemapLabels
from fastkfo.vision.benchmarks.common import Parts, Sizes, check_samples, on_device, refuse
from fastkfo.vision.datasets import FullOmniglot
from fastkfo.vision.datasets.full_omniglot import given_split, split_sizes
from fastkfo.vision.images import resized, to_tensor
from fastkfo.vision.transforms import RandomClassRotation

__all__ = ["omniglot_tasksets"]


def _ink(image: Any) -> Tensor:
    """28 × 28 pixels, 1 where there is ink."""
    return 1.0 - to_tensor(resized(image, 28))


def _random_split(dataset: MetaDataset) -> list[MetaDataset]:
    """1100, 100 and 423 of the 1623 classes, or as many of fewer in proportion."""
    classes = list(range(len(dataset.labels)))
    random.shuffle(classes)
    first, validation, _ = split_sizes(len(classes))
    second = first + validation
    parts = (classes[:first], classes[first:second], classes[second:])
    return [FilteredMetaDataset(dataset, labels=part) for part in parts]


def omniglot_tasksets(
    train_ways: int,
    train_samples: int,
    test_ways: int,
    test_samples: int,
    root: str,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> Parts:
    """Return Omniglot: images `[1, 28, 28]`, 1 where there is ink, each class at a random rotation.

    1100 classes, drawn from Python's global `random` as in learn2learn, are for training, 100 for
    validation and 423 for tests. (In learn2learn, the tasks of all three are drawn from all
    classes; here each from its own.) A class at 0, 90, 180 or 270 degrees is as good as another.
    Where there is `root/omniglot/{train,validation,test}/<class>/*.png`, that is the split.

    Args:
        train_ways: Classes per training task.
        train_samples: Samples per class of a training task, support and query together.
        test_ways: Classes per validation or test task.
        test_samples: Samples per class of these.
        root: Where `FullOmniglot` looks for the data; they are downloaded to there.
        device: Where to put all images; None to read each when it is needed.
        **kwargs: None may be given.

    Returns:
        The three data sets, and the three lists of transforms.

    Raises:
        TypeError: If there is an option that the benchmark does not have.
        ValueError: If a class has fewer images than a task needs, or is in two of the folders.
    """
    refuse("omniglot_tasksets", kwargs)
    given = given_split(root, _ink)
    if given is not None:
        sets = [on_device(part, device) for part in given.values()]
    else:
        sets = _random_split(on_device(FullOmniglot(root, _ink, download=True), device))
    sizes = Sizes(train_ways, train_samples, test_ways, test_samples)
    for i, part in enumerate(sets):
        check_samples(part, i, sizes)
    steps = [_transforms(part, *sizes.of(i)) for i, part in enumerate(sets)]
    return (sets[0], sets[1], sets[2]), (steps[0], steps[1], steps[2])


def _transforms(dataset: MetaDataset, ways: int, samples: int) -> list[Any]:
    return [
        FusedNWaysKShots(dataset, n=ways, k=samples),
        LoadData(dataset),
        RemapLabels(dataset),
        ConsecutiveLabels(dataset),
        RandomClassRotation(dataset, [0.0, 90.0, 180.0, 270.0]),
    ]
