"""The images of the vision data sets, read once, as uint8."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from fastkfo.tasks import Labelled, read_dataset
from fastkfo.training.config import TrainConfig

__all__ = ["cifar_fs", "mini_imagenet", "omniglot"]


def omniglot(config: TrainConfig) -> Labelled:
    """All 1623 characters ``[N, 1, 28, 28]``, strokes bright as in learn2learn's benchmark.

    Args:
        config: Says where they are, and whether they may be fetched.

    Returns:
        The images and their labels.
    """
    return _omniglot(config.root, config.download)


def cifar_fs(config: TrainConfig, split: str) -> Labelled:
    """One split of CIFAR-FS, ``[N, 3, 32, 32]``.

    Args:
        config: Says where it is.
        split: ``train``, ``validation`` or ``test``.

    Returns:
        The images and their labels.
    """
    from fastkfo.vision.datasets import CIFARFS

    return read_dataset(CIFARFS(config.root, mode=split, download=config.download))


def mini_imagenet(config: TrainConfig, split: str) -> Labelled:
    """One split of mini-ImageNet, ``[N, 3, 84, 84]``.

    Args:
        config: Says where it is.
        split: ``train``, ``validation`` or ``test``.

    Returns:
        The images and their labels.
    """
    from fastkfo.vision.datasets import MiniImagenet

    dataset = MiniImagenet(config.root, mode=split, transform=_as_bytes, download=config.download)
    if dataset.x is not None:
        return Labelled(dataset.x.contiguous(), torch.as_tensor(dataset.y))
    return read_dataset(dataset)


@lru_cache(maxsize=1)  # its splits are by class, so all three need the same images
def _omniglot(root: str, download: bool) -> Labelled:
    from fastkfo.vision.datasets import FullOmniglot

    return read_dataset(FullOmniglot(root, transform=_small_and_bright, download=download))


def _small_and_bright(image: Any) -> torch.Tensor:
    from fastkfo.vision.images import pixels, resized

    return 255 - pixels(resized(image, 28))


def _as_bytes(image: torch.Tensor) -> torch.Tensor:
    return image.to(torch.uint8)
