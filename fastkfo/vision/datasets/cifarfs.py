"""CIFAR-FS.

Source: the interface is learn2learn 0.2.0's `vision.datasets.cifarfs`
(https://github.com/learnables/learn2learn).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastkfo.vision.datasets.files import missing, unzip
from fastkfo.vision.datasets.image_folder import (
    ImageFolder,
    check_disjoint,
    folders_in,
    split_folder,
    split_folders,
    split_of,
)

__all__ = ["CIFARFS"]

_URL = "https://zenodo.org/record/7978538/files/cifar100.zip"


class CIFARFS(ImageFolder):
    """CIFAR-FS: 64, 16 and 20 classes of CIFAR-100, 600 images of 32 × 32 pixels of each.

    Read is the first of these that is there, for all three modes the same:

    - `root/cifarfs/processed/{train,val,test}/<class>/*.png`, as learn2learn leaves it;
    - `root/cifarfs/cifar100/data/<class>/*.png`, split by
      `root/cifarfs/cifar100/splits/bertinetto/{train,val,test}.txt`, as in its zip file, which is
      unpacked to there if it is `root/cifarfs.zip` or `root/cifar100.zip`;
    - `root/{cifarfs,cifar-fs}/{train,validation,test}/<class>/*.png`.

    Args:
        root: The folder; `~` is the user's own.
        mode: `"train"`, `"validation"` or `"test"`.
        transform: Of a Pillow image.
        target_transform: Of a label.
        download: Nothing is downloaded, since no checksum has been published with the data set.

    Attributes:
        root: The folder with one folder per class that is read.
        mode: As given.

    Raises:
        FileNotFoundError: If data are not there; the message says what to put where.
        ValueError: If `mode` is none of these, a file is broken, or a class is in two splits.

    Source: Bertinetto et al., "Meta-learning with differentiable closed-form solvers", ICLR 2019.

    Example:
        >>> train = MetaDataset(CIFARFS("~/data", mode="train", transform=to_tensor))
    """

    def __init__(
        self,
        root: str,
        mode: str = "train",
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        download: bool = False,
    ) -> None:
        split_of(mode)
        top = Path(root).expanduser()
        classes = _classes(top, mode)
        super().__init__(classes, transform, target_transform)
        self.mode = mode
        self.root = str(classes[0].parent)
        short = "val" if mode == "validation" else mode
        self._bookkeeping_path = str(top / f"cifarfs-{short}-bookkeeping.pkl")


def _classes(root: Path, mode: str) -> list[Path]:
    raw = root / "cifarfs" / "cifar100"
    tops = [root / "cifarfs" / "processed", root / "cifarfs", root / "cifar-fs"]
    archives = [root / "cifarfs.zip", root / "cifar100.zip"]
    for top in tops:
        if found := split_folders(top):
            return folders_in(split_folder(top, found, mode))
    if not raw.is_dir():
        archive = next((path for path in archives if path.is_file()), None)
        if archive is None:
            how = f"Put {_URL} there (without its checksum, it is not downloaded)."
            short = "val" if mode == "validation" else mode
            plain = [top / part for top in tops[1:] for part in split_of(mode)]
            raise missing("CIFAR-FS", [tops[0] / short, raw, *archives, *plain], how)
        unzip(archive, raw)
    return _split(raw, mode)


def _split(raw: Path, mode: str) -> list[Path]:
    """The folders that a list of the split names."""
    lists = raw / "splits" / "bertinetto"
    files = {
        "train": lists / "train.txt",
        "validation": lists / "val.txt",
        "test": lists / "test.txt",
    }
    names = files[mode]
    if not names.is_file():
        raise FileNotFoundError(f"{names}: expected the list of the split's classes, got no file")
    there = {part: file.read_text().split() for part, file in files.items() if file.is_file()}
    check_disjoint(lists, there)
    found = []
    for name in sorted(there[mode]):
        folder = raw / "data" / name
        if Path(name).name != name or not folder.is_dir():
            raise ValueError(f"{names}: expected names of folders in {raw / 'data'}, got {name!r}")
        found.append(folder)
    return found
