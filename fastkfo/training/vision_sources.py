"""The images of the vision data sets, read once, as uint8."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from fastkfo.tasks import Labelled, read_dataset
from fastkfo.training.config import TrainConfig

if TYPE_CHECKING:
    from fastkfo.vision.datasets.image_folder import ImageFolder

__all__ = ["cifar_fs", "mini_imagenet", "omniglot", "omniglot_split"]


def omniglot(config: TrainConfig) -> Labelled:
    """All 1623 characters ``[N, 1, 28, 28]``, strokes bright as in learn2learn's benchmark.

    Args:
        config: Says where they are, and whether they may be fetched.

    Returns:
        The images and their labels.
    """
    return _omniglot(config.root, config.download)


def omniglot_split(config: TrainConfig, split: str) -> Labelled | None:
    """One split of Omniglot, where folders say what is in which; as `omniglot`'s images.

    Args:
        config: Says where they are.
        split: ``train``, ``validation`` or ``test``.

    Returns:
        The images and their labels, or None if there are no such folders.
    """
    from fastkfo.vision.datasets.full_omniglot import given_split

    given = given_split(config.root, _small_and_bright)
    return None if given is None else _read(given[split])


def cifar_fs(config: TrainConfig, split: str) -> Labelled:
    """One split of CIFAR-FS, ``[N, 3, 32, 32]``.

    Args:
        config: Says where it is.
        split: ``train``, ``validation`` or ``test``.

    Returns:
        The images and their labels.
    """
    from fastkfo.vision.datasets import CIFARFS

    return _read(CIFARFS(config.root, mode=split, download=config.download))


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
        images, labels = dataset.x.contiguous(), torch.as_tensor(dataset.y)
        return Labelled(images, labels, tuple(dataset.class_idx))
    return read_dataset(dataset)._replace(names=tuple(dataset.class_idx))


@lru_cache(maxsize=1)  # its splits are by class, so all three need the same images
def _omniglot(root: str, download: bool) -> Labelled:
    from fastkfo.vision.datasets import FullOmniglot

    return _read(FullOmniglot(root, transform=_small_and_bright, download=download))


def _read(dataset: ImageFolder) -> Labelled:
    return read_dataset(dataset)._replace(names=tuple(dataset.classes))


def _small_and_bright(image: Any) -> torch.Tensor:
    from fastkfo.vision.images import pixels, resized

    return 255 - pixels(resized(image, 28))


def _as_bytes(image: torch.Tensor) -> torch.Tensor:
    return image.to(torch.uint8)
