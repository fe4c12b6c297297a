"""mini-ImageNet.

Source: the interface is learn2learn 0.2.0's `vision.datasets.mini_imagenet`
(https://github.com/learnables/learn2learn).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastkfo.data.unpickling import load_plain
from fastkfo.vision.datasets.files import missing
from fastkfo.vision.datasets.image_folder import (
    ImageFolder,
    folders_in,
    split_folder,
    split_folders,
    split_of,
)
from fastkfo.vision.images import pixels, resized

__all__ = ["MiniImagenet"]

_URL = "https://zenodo.org/record/7978538/files"
_CACHE = "mini-imagenet-cache-{}.pkl"
_EDGE = 84


class MiniImagenet(Dataset[Any]):
    """mini-ImageNet: 64, 16 and 20 classes, 600 images of 84 × 84 pixels of each.

    Images are `[3, 84, 84]`, of torch's default dtype, from 0 to 255. Read is
    `root/mini-imagenet-cache-{train,validation,test}.pkl`, as learn2learn has them: a dictionary
    with `image_data`, `[N, H, W, 3]` in uint8, and `class_dict`, from a name to indices. Else
    `root/mini-imagenet/{train,validation,test}/<class>/*.jpg`, resized to 84 pixels. One of the
    two serves all three modes. Pickles are read so that they can run nothing.

    Args:
        root: The folder; `~` is the user's own.
        mode: `"train"`, `"validation"` or `"test"`.
        transform: Of an image.
        target_transform: Of a label.
        download: Nothing is downloaded, since no checksum has been published with the data set.

    Attributes:
        root: As given, without `~`.
        mode: As given.
        x: All images, `[N, 3, H, W]`, uint8; None where they lie in folders.
        y: All labels, `[N]`, int64.
        class_idx: The label of each name.

    Raises:
        FileNotFoundError: If data are not there; the message says what to put where.
        ValueError: If `mode` is none of these, a class is in two of the folders, or a file is
            broken, or names something that could run (`fastkfo.data.UnsafePickleError`).

    Source: Vinyals et al., "Matching Networks for One Shot Learning", NeurIPS 2016; the split is
    that of Ravi and Larochelle, "Optimization as a Model for Few-Shot Learning", ICLR 2017.

    Example:
        >>> train = MetaDataset(MiniImagenet("~/data", mode="train"))
    """

    def __init__(
        self,
        root: str,
        mode: str = "train",
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        download: bool = False,
    ) -> None:
        parts = split_of(mode)
        top = Path(root).expanduser()
        self.root, self.mode = str(top), mode
        self.transform, self.target_transform = transform, target_transform
        self._bookkeeping_path = str(top / f"mini-imagenet-bookkeeping-{mode}.pkl")
        files, folders = _pickles(top), split_folders(top / "mini-imagenet")
        self.x: Tensor | None = None
        self._folder: ImageFolder | None = None
        if files:
            self.x, self.y, self.class_idx = _from_pickle(split_folder(top, files, mode))
        elif folders:
            folder = split_folder(top / "mini-imagenet", folders, mode)
            self._folder = ImageFolder(folders_in(folder))
            self.y, self.class_idx = np.array(self._folder.targets), self._folder.class_to_idx
        else:
            looked = [top / _CACHE.format(part) for part in parts]
            how = f"Put {_URL}/{looked[0].name} there (without its checksum, it is not downloaded)."
            looked += [top / "mini-imagenet" / part for part in parts]
            raise missing("mini-ImageNet", looked, how)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, idx: int) -> tuple[Any, Any]:
        image = self._image(idx).to(torch.get_default_dtype())
        image = image if self.transform is None else self.transform(image)
        return image, self._target(int(self.y[idx]))

    def _image(self, idx: int) -> Tensor:
        if self.x is not None:
            return self.x[idx]
        folder: Any = self._folder
        image = resized(folder[idx][0], _EDGE)
        if image.size != (_EDGE, _EDGE):
            raise ValueError(f"{folder.samples[idx][0]}: expected a square image, got {image.size}")
        return pixels(image)

    def _target(self, label: int) -> Any:
        return label if self.target_transform is None else self.target_transform(label)

    def _labels(self) -> list[Any]:
        return [self._target(label) for label in self.y.tolist()]


def _pickles(top: Path) -> dict[str, Path]:
    """The file of each split that is there."""
    found: dict[str, Path] = {}
    for mode in ("train", "validation", "test"):
        for part in split_of(mode):
            path = top / _CACHE.format(part)
            if mode not in found and path.is_file():
                found[mode] = path
    return found


def _from_pickle(path: Path) -> tuple[Tensor, np.ndarray[Any, Any], dict[str, int]]:
    """Images, labels, and the label of each name."""
    data = load_plain(path)
    if not isinstance(data, dict) or not {"image_data", "class_dict"} <= data.keys():
        raise ValueError(f"{path}: expected a dictionary with image_data and class_dict")
    images, classes = data["image_data"], data["class_dict"]
    shape: tuple[int, ...] = getattr(images, "shape", ())
    if len(shape) != 4 or shape[-1] != 3 or images.dtype != np.uint8:
        got = f"{shape}, {getattr(images, 'dtype', type(images).__name__)}"
        raise ValueError(f"{path}: expected image_data [N, H, W, 3] in uint8, got {got}")
    if not isinstance(classes, dict):
        raise ValueError(f"{path}: expected a dictionary class_dict, got {type(classes).__name__}")
    labels = np.full(len(images), -1)
    for label, indices in enumerate(classes.values()):
        where = np.asarray(indices, dtype=np.int64)
        if where.size and not 0 <= where.min() <= where.max() < len(images):
            raise ValueError(f"{path}: expected indices of its {len(images)} images in class_dict")
        if (labels[where] >= 0).any():
            raise ValueError(f"{path}: expected one class per image, got two in class_dict")
        labels[where] = label
    if (labels < 0).any():
        raise ValueError(f"{path}: expected a class for every image, got images without one")
    return (
        torch.from_numpy(images).permute(0, 3, 1, 2),
        labels,
        {c: i for i, c in enumerate(classes)},
    )
