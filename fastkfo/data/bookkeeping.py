"""Which samples have which label: found without loading samples where possible, kept on disk."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Hashable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from fastkfo.data.unpickling import UnsafePickleError, load_plain
from fastkfo.data.whole_files import written_whole

__all__ = ["by_index", "by_label", "labels_of", "load", "save"]

_PLAIN = (str, bytes, int, float, bool, type(None))


def by_label(labels: Iterable[tuple[int, Any]]) -> dict[Any, list[int]]:
    """Map every label to its indices, in the order in which they come."""
    found: dict[Any, list[int]] = {}
    for index, label in labels:
        if label in found:
            found[label].append(index)
        else:
            found[label] = [index]
    return found


def by_index(indices: Mapping[Any, Iterable[int]]) -> dict[int, Any]:
    """Map every index to its label, in the order in which they come."""
    return {index: label for label, of_label in indices.items() for index in of_label}


def labels_of(dataset: Dataset[Any]) -> list[Any]:
    """The label of every sample: `dataset[i][1]`, a number where that is a tensor.

    Samples of tensors, of parts of other data sets and of fastkfo's own are not loaded.

    Args:
        dataset: With a length.

    Returns:
        One label per sample, in order.

    Raises:
        TypeError: If it has no length, its samples have no second item, or a label cannot be a key.
        ValueError: If a label is a tensor of more than one element.
    """
    known = known_labels(dataset)
    if known is not None:
        return known
    if not hasattr(dataset, "__len__"):
        raise TypeError(f"dataset: expected one with a length, got {type(dataset).__name__}")
    found = []
    for i in range(len(dataset)):
        sample = dataset[i]
        try:
            label = sample[1]
        except (TypeError, IndexError, KeyError) as error:
            got = type(sample).__name__
            raise TypeError(f"dataset: expected samples (data, label), got {got} at {i}") from error
        found.append(label if type(label) in _PLAIN else _key(label, i))
    return found


def known_labels(dataset: Any) -> list[Any] | None:
    """All labels, if there is a way to them that loads no sample."""
    if callable(own := getattr(dataset, "_labels", None)):
        return list(own())
    kind = type(dataset)
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        # A subclass may do anything to a label, unless it says that it leaves labels alone.
        plain = kind.__getitem__ is TensorDataset.__getitem__
        if (plain or getattr(dataset, "_keeps_labels", False)) and dataset.tensors[1].dim() == 1:
            found: list[Any] = dataset.tensors[1].tolist()
            return found
    if kind is Subset and (inner := known_labels(dataset.dataset)) is not None:
        return [inner[i] for i in dataset.indices]
    if kind is ConcatDataset:
        parts = [known_labels(part) for part in dataset.datasets]
        if not any([part is None for part in parts]):
            return list(chain(*[part for part in parts if part is not None]))
    return None


def _key(label: Any, index: int) -> Any:
    """A label as a key: a number where it is a tensor, or one of numpy's."""
    if isinstance(label, Tensor) and label.numel() != 1:
        raise ValueError(
            f"dataset: expected scalar labels, got shape {tuple(label.shape)} at {index}"
        )
    label = label.item() if hasattr(label, "item") else label
    if not isinstance(label, Hashable):
        raise TypeError(
            f"dataset: expected labels that can be keys, got {type(label).__name__} at {index}"
        )
    return label


def load(path: str, dataset: Dataset[Any]) -> tuple[dict[Any, list[int]], dict[int, Any]] | None:
    """Read what `save`, or learn2learn, kept of this data set.

    Args:
        path: Of the file.
        dataset: Whose number of samples has to be that of the file.

    Returns:
        Indices by label and labels by index; None if there is no file, or none that fits: it is
        then to be made anew. A file that is there but does not fit is warned about.

    Raises:
        UnsafePickleError: If the file names something other than plain data.
    """
    if not os.path.exists(path):
        return None
    try:
        kept = load_plain(path)
        indices, labels = kept["labels_to_indices"], kept["indices_to_labels"]
        indices = {label: list(of_label) for label, of_label in indices.items()}
        whole = len(labels) == len(dataset) and by_index(indices) == labels  # type: ignore[arg-type]
        if whole and sum(map(len, indices.values())) == len(labels):
            return indices, dict(labels)
        reason = f"it is of {len(labels)} samples, the data set has {len(dataset)}"  # type: ignore[arg-type]
    except UnsafePickleError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        reason = str(error)
    warnings.warn(
        f"{path}: the bookkeeping kept there does not fit and is made anew ({reason})", stacklevel=4
    )
    return None


def save(path: str, bookkeeping: dict[str, Any]) -> None:
    """Keep the bookkeeping in a file that `load` and learn2learn read; whole or not at all.

    Args:
        path: Of the file. If it cannot be written, or a label is not plain, a warning says so.
        bookkeeping: `labels_to_indices`, `indices_to_labels` and `labels`.
    """
    unusual = [label for label in bookkeeping["labels"] if type(label) not in _PLAIN]
    if unusual:
        kind = type(unusual[0]).__name__
        warnings.warn(
            f"{path}: not written, as labels of type {kind} are no plain data", stacklevel=4
        )
        return
    try:
        with written_whole(Path(path)) as file:
            pickle.dump(bookkeeping, file, protocol=4)
    except OSError as error:
        warnings.warn(f"{path}: the bookkeeping was not kept ({error})", stacklevel=4)
