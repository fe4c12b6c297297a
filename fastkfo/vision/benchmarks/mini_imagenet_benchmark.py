"""The mini-ImageNet benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkfo.vision.augmentation import (
    ColorJitter,
    Compose,
    Normalize,
    RandomCrop,
    RandomHorizontalFlip,
)
from fastkfo.vision.benchmarks.common import Parts, Sizes, of_classes, on_device, refuse
from fastkfo.vision.datasets import MiniImagenet

__all__ = ["mini_imagenet_tasksets"]

_Transform = Callable[[Tensor], Tensor]
_MEAN = [value / 255 for value in (120.39586422, 115.59361427, 104.54012653)]
_STD = [value / 255 for value in (70.68188272, 68.27635443, 72.54505529)]


def _from_bytes(image: Tensor) -> Tensor:
    return image / 255


def _lee2019() -> tuple[_Transform, _Transform]:
    normalize = Normalize(_MEAN, _STD)
    train: list[_Transform] = [
        _from_bytes,
        RandomCrop(84, padding=8),
        ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
        RandomHorizontalFlip(),
        normalize,
    ]
    return Compose(train), Compose([_from_bytes, normalize])


def _augmentation(name: str | None) -> tuple[_Transform | None, _Transform | None]:
    """Transforms of training and of test images."""
    if name is None:
        return None, None
    if name == "normalize":
        return _from_bytes, _from_bytes
    if name == "lee2019":
        return _lee2019()
    raise ValueError(f"data_augmentation: expected None, normalize or lee2019, got {name!r}")


def mini_imagenet_tasksets(
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    root: str = "~/data",
    data_augmentation: str | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> Parts:
    """Return mini-ImageNet: images `[3, 84, 84]`, from 0 to 255.

    Args:
        train_ways: Classes per training task.
        train_samples: Samples per class of a training task, support and query together.
        test_ways: Classes per validation or test task.
        test_samples: Samples per class of these.
        root: Where `MiniImagenet` looks for the data.
        data_augmentation: `"normalize"`: from 0 to 1. `"lee2019"`: mean 0 and variance 1, and
            random crops, colours and reflections when training. (There, learn2learn multiplies
            training images by 255 once too often, and does not scale test images.)
        device: Where to put all images; None to convert each when it is needed.
        **kwargs: None may be given.

    Returns:
        The three data sets, and the three lists of transforms.

    Raises:
        TypeError: If there is an option that the benchmark does not have.
        ValueError: If there is no such augmentation.

    Source: Lee et al., "Meta-Learning with Differentiable Convex Optimization", CVPR 2019.
    """
    refuse("mini_imagenet_tasksets", kwargs)
    train, test = _augmentation(data_augmentation)
    sets = []
    for mode, transform in (("train", train), ("validation", test), ("test", test)):
        dataset = MiniImagenet(root, mode, download=True)
        if device is None:
            dataset.transform = transform
        sets.append(on_device(dataset, device, transform))
    return of_classes(sets, Sizes(train_ways, train_samples, test_ways, test_samples))
