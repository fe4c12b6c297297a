"""Labelled images from data sets and folders, as two tensors."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkfo.tasks import checks

__all__ = ["Labelled", "read_dataset", "read_folder"]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png")
_MODES = {1: "L", 3: "RGB"}


class Labelled(NamedTuple):
    """Images and what they show.

    Attributes:
        images: ``[N, ...]``.
        labels: ``[N]``, int64.
        names: Of the classes: label i is ``names[i]``. Empty where labels have no names.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...] = ()


def read_dataset(dataset: Any) -> Labelled:
    """Reads every sample of a data set once.

    Args:
        dataset: With a length and items (image, label), as ``torch.utils.data.Dataset``. An image
            is a tensor, an array, or a PIL image (read as uint8, ``[C, H, W]``).

    Returns:
        The images, in the data set's order and dtype, and their labels.

    Raises:
        TypeError: If there is no length, an item is no pair, or a label is no integer.
        ValueError: If there is no sample, or two images differ in shape or dtype.

    Example:
        >>> images, labels, _ = read_dataset(dataset)
        >>> train, test = split_classes(labels, (0.8, 0.2))
    """
    try:
        length = len(dataset)
    except TypeError as error:
        raise TypeError(f"dataset: expected one with a length, got {error}") from error
    if length == 0:
        raise ValueError("dataset: expected at least one sample, got none")
    images: list[Tensor] = []
    labels: list[int] = []
    for index in range(length):
        item = dataset[index]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise TypeError(f"dataset[{index}]: expected (image, label), got {type(item).__name__}")
        images.append(_image(item[0], index))
        labels.append(_label(item[1], index))
        first, last = images[0], images[-1]
        if (last.shape, last.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"dataset[{index}]: expected an image of shape {list(first.shape)} and "
                f"{first.dtype}, as dataset[0] is, got {list(last.shape)} and {last.dtype}"
            )
    return Labelled(torch.stack(images), torch.tensor(labels))


def read_folder(
    path: str | os.PathLike[str],
    *,
    size: int | tuple[int, int] | None = None,
    channels: int = 3,
    classes: Iterable[str] | None = None,
) -> Labelled:
    """Reads ``<path>/<class>/*.png``, ``jpg``, ``jpeg`` or ``bmp``.

    Args:
        path: The folder of folders. Hidden folders are left out.
        size: Height and width to resize to (bilinear), one number for both. Default: as they are.
        channels: 1 (grey) or 3 (RGB).
        classes: Folders to read. Default: all of them, in the order of their names.

    Returns:
        The images, uint8 ``[N, C, H, W]``, labels from 0, and the folders' names.

    Raises:
        TypeError: If size or channels is no integer.
        ValueError: If there is no such folder, a class without images, an image that cannot be
            read, or two images that differ in size and no size is given.
        ModuleNotFoundError: If Pillow is not installed.

    Example:
        >>> images, labels, names = read_folder("omniglot", size=28, channels=1)
    """
    height_width = _size(size)
    checks.integer("channels", channels)
    if channels not in _MODES:
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    root = Path(path)
    names = _names(root) if classes is None else tuple(classes)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"classes: expected distinct folders in {root}, got {list(names)}")
    files = [_files(root / name) for name in names]
    arrays: list[np.ndarray[Any, Any]] = []
    for file in [f for of_class in files for f in of_class]:
        arrays.append(_read(file, height_width, _MODES[channels]))
        if arrays[-1].shape != arrays[0].shape:
            raise ValueError(
                f"size: expected one to resize to, because images differ: {files[0][0]} is "
                f"{arrays[0].shape[:2]}, {file} is {arrays[-1].shape[:2]}"
            )
    images = torch.from_numpy(np.stack(arrays)).view(len(arrays), *arrays[0].shape[:2], channels)
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor([len(f) for f in files]))
    return Labelled(images.permute(0, 3, 1, 2).contiguous(), labels, names)


def _image(image: Any, index: int) -> Tensor:
    if isinstance(image, Tensor):
        return image.detach().cpu()
    if hasattr(image, "getbands"):  # PIL's, without importing it
        array = np.array(image)
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(array))
    try:
        return torch.as_tensor(image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"dataset[{index}]: expected an image, got {type(image).__name__}"
        ) from error


def _label(label: Any, index: int) -> int:
    if not isinstance(label, bool):
        try:
            return operator.index(label)  # tensors and numpy's integers have one too
        except TypeError:
            pass
    raise TypeError(f"dataset[{index}]: expected an integer label, got {type(label).__name__}")


def _size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    both: Sequence[int] = size if isinstance(size, tuple | list) else (size, size)
    if len(both) != 2:
        raise ValueError(f"size: expected a height and a width, got {size}")
    checks.count("size", both[0])
    checks.count("size", both[1])
    return both[0], both[1]


def _names(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise ValueError(f"path: expected a folder, got {root}")
    return tuple(
        sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    )


def _files(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    files = sorted(p for p in found if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not files:
        raise ValueError(f"path: expected images ({', '.join(SUFFIXES)}) in {folder}, got none")
    return files


def _read(file: Path, size: tuple[int, int] | None, mode: str) -> np.ndarray[Any, Any]:
    from fastkfo.vision.images import read_image

    image = read_image(file, mode)
    if size is not None and (image.height, image.width) != size:
        from PIL.Image import Resampling

        image = image.resize((size[1], size[0]), Resampling.BILINEAR)
    return np.asarray(image)
