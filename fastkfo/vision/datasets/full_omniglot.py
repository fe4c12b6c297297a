"""Omniglot, both of its parts.

Source: the interface is learn2learn 0.2.0's `vision.datasets.full_omniglot`
(https://github.com/learnables/learn2learn); addresses and checksums are torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastkfo.vision.datasets.files import download as fetch
from fastkfo.vision.datasets.files import missing, unzip
from fastkfo.vision.datasets.image_folder import (
    ImageFolder,
    folders_in,
    split_folder,
    split_folders,
)

__all__ = ["FullOmniglot", "given_split", "split_sizes"]

_ADDRESS = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
_MD5 = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}


class FullOmniglot(ImageFolder):
    """Omniglot: 1623 characters of 50 alphabets, 20 grey images of 105 × 105 pixels of each.

    Labels are 0 to 963 for the background set, then the evaluation set's, each in the order of
    alphabets' and characters' names. (In learn2learn they are in whatever order the file system
    lists them.)

    Read is `root/omniglot-py/images_background/<alphabet>/<character>/*.png`, and the same of
    `images_evaluation`, as torchvision leaves them. A zip file of that name in `root/omniglot-py`
    or `root` is unpacked to there.

    Args:
        root: The folder; `~` is the user's own.
        transform: Of a Pillow image.
        target_transform: Of a label.
        download: Whether to download what is not there.

    Attributes:
        root: As given, without `~`.

    Raises:
        FileNotFoundError: If data are not there, or one of the parts is empty; the message says
            what to put where.
        ValueError: If a zip file is broken.

    Source: Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic
    program induction", Science, 2015.

    Example:
        >>> omniglot = MetaDataset(FullOmniglot("~/data", transform=to_tensor, download=True))
    """

    def __init__(
        self,
        root: str,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        download: bool = False,
    ) -> None:
        self.root = str(Path(root).expanduser())
        characters = []
        for part in _MD5:
            folder = _part(Path(self.root), part, download)
            found = [c for alphabet in folders_in(folder) for c in folders_in(alphabet)]
            if not found:
                raise FileNotFoundError(f"{folder}: expected <alphabet>/<character>, got none")
            characters += found
        super().__init__(characters, transform, target_transform, mode="L")
        self.classes = [f"{folder.parent.name}/{folder.name}" for folder in characters]
        self.class_to_idx = {name: i for i, name in enumerate(self.classes)}
        self._bookkeeping_path = str(Path(self.root) / "omniglot-bookkeeping.pkl")


def given_split(
    root: str | Path, transform: Callable[[Any], Any] | None = None
) -> dict[str, ImageFolder] | None:
    """Return `root/omniglot/{train,validation,test}/<class>/*.png`, if there is such a folder.

    Args:
        root: The folder; `~` is the user's own.
        transform: Of a Pillow image.

    Returns:
        Each split's images, or None if there is none of the three.

    Raises:
        FileNotFoundError: If there are some of the three, not all.
        ValueError: If a class is in two of them.
    """
    top = Path(root).expanduser() / "omniglot"
    found = split_folders(top)
    if not found:
        return None
    folders = {mode: split_folder(top, found, mode) for mode in ("train", "validation", "test")}
    return {m: ImageFolder(folders_in(f), transform, mode="L") for m, f in folders.items()}


def split_sizes(classes: int) -> tuple[int, int, int]:
    """Return how many classes are for train, validation and test: of 1623, 1100, 100 and 423.

    Args:
        classes: How many there are; of fewer than 1623, in proportion.

    Returns:
        The sizes.
    """
    first, second = (round(classes * end / 1623) for end in (1100, 1200))
    return first, second - first, classes - second


def _part(root: Path, part: str, download: bool) -> Path:
    """One of the two folders, made from its zip file if need be."""
    folder = root / "omniglot-py" / part
    if folder.is_dir():
        return folder
    archives = [folder.with_name(f"{part}.zip"), root / f"{part}.zip"]
    archive = next((path for path in archives if path.is_file()), None)
    if archive is None:
        url = f"{_ADDRESS}/{part}.zip"
        how = f"Put {url} there, or pass download=True (fastkfo train: --download)."
        if not download:
            raise missing("Omniglot", [folder, *archives], how)
        archive = archives[0]
        try:
            fetch(url, archive, _MD5[part])
        except OSError as error:
            how = f"Its download failed ({error}). Put {url} there."
            raise missing("Omniglot", [folder, *archives], how) from error
    unzip(archive, folder)
    return folder
