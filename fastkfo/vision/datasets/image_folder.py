"""Images in one folder per class."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from fastkfo.vision.images import read_image

__all__ = [
    "ImageFolder",
    "check_disjoint",
    "folders_in",
    "split_folder",
    "split_folders",
    "split_of",
]

_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_MODES = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}


def split_of(mode: str) -> tuple[str, ...]:
    """Return the names that the folder of a split may have.

    Args:
        mode: The split.

    Returns:
        The names, its own first.

    Raises:
        ValueError: If there is no such split.
    """
    if mode not in _MODES:
        raise ValueError(f"mode: expected one of {', '.join(_MODES)}, got {mode!r}")
    return _MODES[mode]


def folders_in(folder: str | Path) -> list[Path]:
    """Return the folders in a folder, sorted by name; hidden ones are left out."""
    found = [path for path in Path(folder).iterdir() if path.is_dir()]
    return sorted(path for path in found if not path.name.startswith("."))


def split_folders(top: Path) -> dict[str, Path]:
    """Return the folders of the splits that lie in a folder, those without any class left out.

    Args:
        top: A folder, or nothing.

    Returns:
        The folder of each split that is there.

    Raises:
        ValueError: If a class is in two of them.
    """
    places = [(mode, top / name) for mode in _MODES for name in split_of(mode)]
    found: dict[str, Path] = {}
    for mode, folder in places:
        if mode not in found and folder.is_dir() and folders_in(folder):
            found[mode] = folder
    check_disjoint(
        top, {mode: [c.name for c in folders_in(folder)] for mode, folder in found.items()}
    )
    return found


def split_folder(top: Path, found: Mapping[str, Path], mode: str) -> Path:
    """Return what was found of a split: one layout is used for all three, or none.

    Args:
        top: Where it was found.
        found: A path per split.
        mode: The split.

    Returns:
        Its path.

    Raises:
        FileNotFoundError: If others were found, but not this one.
    """
    if mode not in found:
        others = ", ".join(str(path) for path in found.values())
        raise FileNotFoundError(
            f"{top}: expected {mode} beside {others}, got none; layouts are not mixed"
        )
    return found[mode]


def check_disjoint(where: Path, classes: Mapping[str, Iterable[str]]) -> None:
    """Raise if a class is in two splits: tests would be on what was trained on.

    Args:
        where: The splits are.
        classes: The names of each split's classes.

    Raises:
        ValueError: If a name is in two.
    """
    owner: dict[str, str] = {}
    for mode, names in classes.items():
        for name in names:
            if owner.setdefault(name, mode) != mode:
                raise ValueError(
                    f"{where}: expected every class in one split, got {name!r} in {owner[name]} "
                    f"and {mode}"
                )


def _images_in(folder: Path) -> list[str]:
    found = []
    for where, _, names in sorted(os.walk(folder, followlinks=True)):
        found += [
            os.path.join(where, name)
            for name in sorted(names)
            if name.lower().endswith(_ENDINGS) and not name.startswith(".")
        ]
    return found


class ImageFolder(Dataset[Any]):
    """Images in one folder per class, as torchvision's of that name: `folder/<class>/*.png`.

    No image is read before it is asked for.

    Args:
        classes: The folders; the order is that of the labels 0, 1, ….
        transform: Of a Pillow image.
        target_transform: Of a label.
        mode: Pillow's name of what an image is read as.

    Attributes:
        classes: The folders' names.
        class_to_idx: The label of each.
        samples: Path and label of each image.
        targets: The label of each image.

    Raises:
        FileNotFoundError: If there is no folder, or one without images.
    """

    def __init__(
        self,
        classes: Iterable[Path],
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        mode: str = "RGB",
    ) -> None:
        folders = list(classes)
        if not folders:
            raise FileNotFoundError("classes: expected at least one folder with images, got none")
        self.transform, self.target_transform = transform, target_transform
        self.classes = [folder.name for folder in folders]
        self.class_to_idx = {name: i for i, name in enumerate(self.classes)}
        self.samples: list[tuple[str, int]] = []
        for label, folder in enumerate(folders):
            images = _images_in(folder)
            if not images:
                raise FileNotFoundError(f"{folder}: expected images ({', '.join(_ENDINGS)})")
            self.samples += [(path, label) for path in images]
        self.imgs = self.samples
        self.targets = [label for _, label in self.samples]
        self._mode = mode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        path, label = self.samples[index]
        image = read_image(path, self._mode)
        image = image if self.transform is None else self.transform(image)
        return image, self._target(label)

    def _target(self, label: int) -> Any:
        return label if self.target_transform is None else self.target_transform(label)

    def _labels(self) -> list[Any]:
        return [self._target(label) for label in self.targets]
