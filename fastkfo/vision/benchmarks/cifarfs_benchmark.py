"""The CIFAR-FS benchmark."""

from __future__ import annotations

from typing import Any

import torch

from fastkfo.vision.benchmarks.common import Parts, Sizes, of_classes, on_device, refuse
from fastkfo.vision.datasets import CIFARFS
from fastkfo.vision.images import to_tensor

__all__ = ["cifarfs_tasksets"]


def cifarfs_tasksets(
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    root: str = "~/data",
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> Parts:
    """Return CIFAR-FS: images `[3, 32, 32]`, from 0 to 1.

    Args:
        train_ways: Classes per training task.
        train_samples: Samples per class of a training task, support and query together.
        test_ways: Classes per validation or test task.
        test_samples: Samples per class of these.
        root: Where `CIFARFS` looks for the data.
        device: Where to put all images; None to read each when it is needed.
        **kwargs: None may be given.

    Returns:
        The three data sets, and the three lists of transforms.

    Raises:
        TypeError: If there is an option that the benchmark does not have.
    """
    refuse("cifarfs_tasksets", kwargs)
    sets = [
        on_device(CIFARFS(root, mode, to_tensor, download=True), device)
        for mode in ("train", "validation", "test")
    ]
    return of_classes(sets, Sizes(train_ways, train_samples, test_ways, test_samples))
