"""Data sets that know which samples have which label.

Source: the interface is learn2learn 0.2.0's `data.meta_dataset`
(https://github.com/learnables/learn2learn), which is compiled there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from operator import index as as_index
from typing import Any

from torch.utils.data import Dataset

from fastkfo.data.bookkeeping import by_index, by_label, known_labels, labels_of, load, save

__all__ = ["FilteredMetaDataset", "MetaDataset", "UnionMetaDataset"]


class MetaDataset(Dataset[Any]):
    """A classification data set, and which of its samples have which label.

    The bookkeeping comes from what is passed, else from what is known without loading samples, else
    from the file `dataset._bookkeeping_path`, if the data set has such an attribute and the file
    fits, else from every `dataset[i][1]`; it is then kept in that file. learn2learn's files are
    read, and it reads these; no file can run code.

    Args:
        dataset: Samples `(data, label, ...)`; a label is a scalar tensor or can be a key.
        labels_to_indices: The indices of each label, if known.
        indices_to_labels: The label of each index, if known. If both are given they must agree.

    Attributes:
        dataset: As given.
        labels_to_indices: Label to the list of its indices.
        indices_to_labels: Index to its label.
        labels: The labels, in the order in which they first occur.

    Raises:
        TypeError: If `dataset` is no `torch.utils.data.Dataset`, or its samples are not such.
        ValueError: If the labels are no scalars, or the dictionaries disagree.
        UnsafePickleError: If the file names something other than plain data.

    Example:
        >>> data = TensorDataset(torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 7, 7]))
        >>> MetaDataset(data).labels_to_indices
        {0: [0, 2], 1: [1, 3], 7: [4, 5]}
    """

    labels_to_indices: dict[Any, list[int]]
    indices_to_labels: dict[int, Any]
    labels: list[Any]

    def __init__(
        self,
        dataset: Dataset[Any],
        labels_to_indices: Mapping[Any, Sequence[int]] | None = None,
        indices_to_labels: Mapping[int, Any] | None = None,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError(f"dataset: expected a torch Dataset, got {type(dataset).__name__}")
        self.dataset = dataset
        path = getattr(dataset, "_bookkeeping_path", None)
        given = labels_to_indices is not None or indices_to_labels is not None
        if path is None or given or known_labels(dataset) is not None:
            self.create_bookkeeping(labels_to_indices, indices_to_labels)
        else:
            self.load_bookkeeping(path)

    def __getitem__(self, item: int) -> Any:
        return self.dataset[item]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def create_bookkeeping(
        self,
        labels_to_indices: Mapping[Any, Sequence[int]] | None = None,
        indices_to_labels: Mapping[int, Any] | None = None,
    ) -> None:
        """Make the bookkeeping: from either argument, or from the data set's labels.

        Args:
            labels_to_indices: The indices of each label.
            indices_to_labels: The label of each index.

        Raises:
            ValueError: If both are given and disagree, or an index has two labels.
        """
        if labels_to_indices is not None:
            indices = {label: list(of_label) for label, of_label in labels_to_indices.items()}
            labels = by_index(indices)
            if len(labels) != sum(map(len, indices.values())):
                raise ValueError("labels_to_indices: expected every index once, got one twice")
            if indices_to_labels is not None and labels != indices_to_labels:
                raise ValueError(
                    "indices_to_labels: expected what labels_to_indices says, got something else"
                )
        else:
            labels = dict(
                enumerate(labels_of(self.dataset))
                if indices_to_labels is None
                else indices_to_labels
            )
            indices = by_label(labels.items())
        self._keep(indices, labels)

    def load_bookkeeping(self, path: str) -> None:
        """Take the bookkeeping from a file, or make it and keep it there.

        Args:
            path: Of the file.
        """
        if (found := load(path, self.dataset)) is not None:
            self._keep(*found)
        else:
            self.create_bookkeeping()
            self.serialize_bookkeeping(path)

    def serialize_bookkeeping(self, path: str) -> None:
        """Keep the bookkeeping in a file, whole or not at all.

        Args:
            path: Of the file.
        """
        save(path, self._bookkeeping)

    def _keep(self, indices: dict[Any, list[int]], labels: dict[int, Any]) -> None:
        self.labels_to_indices, self.indices_to_labels = indices, labels
        self.labels = list(indices)
        self._bookkeeping = {
            "labels_to_indices": indices,
            "indices_to_labels": labels,
            "labels": self.labels,
        }


class UnionMetaDataset(MetaDataset):
    """Several data sets as one, with labels 0, 1, … over all of them.

    A label that two of them have becomes two labels. Samples come as lists, the label replaced.

    Args:
        datasets: Data sets; those that are no `MetaDataset` become one.

    Attributes:
        datasets: As given, each a `MetaDataset`.

    Raises:
        TypeError: If one of them is no data set.
        ValueError: If there is none.

    Example:
        >>> len(UnionMetaDataset([train, valid, test]).labels)
        100
    """

    def __init__(self, datasets: Iterable[Dataset[Any]]) -> None:
        self.datasets = [d if isinstance(d, MetaDataset) else MetaDataset(d) for d in datasets]
        if not self.datasets:
            raise ValueError("datasets: expected at least one data set, got none")
        self._ends = list(accumulate(len(dataset) for dataset in self.datasets))
        labels: dict[int, Any] = {}
        labels_before = 0
        for dataset, end in zip(self.datasets, self._ends, strict=True):
            before = end - len(dataset)
            place = {label: labels_before + i for i, label in enumerate(dataset.labels)}
            labels.update({before + i: place[y] for i, y in dataset.indices_to_labels.items()})
            labels_before += len(place)
        self._keep(by_label(labels.items()), labels)

    def __getitem__(self, item: int) -> list[Any]:
        item = as_index(item)
        place = item + len(self) if item < 0 else item
        if not 0 <= place < len(self):
            raise IndexError(f"item: expected less than {len(self)}, the samples, got {item}")
        which = bisect_right(self._ends, place)
        dataset = self.datasets[which]
        sample = list(dataset[place - self._ends[which] + len(dataset)])
        sample[1] = self.indices_to_labels[place]
        return sample

    def __len__(self) -> int:
        return self._ends[-1]


class FilteredMetaDataset(MetaDataset):
    """Those samples of a data set that have one of some labels, which they keep.

    Args:
        dataset: A data set; if it is no `MetaDataset`, it becomes one.
        labels: Distinct labels. Samples are in the order of these.

    Attributes:
        dataset: As given, as a `MetaDataset`.
        to_true_indices: The index in `dataset` of each sample.

    Raises:
        TypeError: If it is no data set.
        ValueError: If the data set does not have one of the labels, or one comes twice.

    Example:
        >>> FilteredMetaDataset(train, [4, 8, 2, 1, 9]).labels
        [4, 8, 2, 1, 9]
    """

    def __init__(self, dataset: Dataset[Any], labels: Iterable[Any]) -> None:
        self.dataset = dataset if isinstance(dataset, MetaDataset) else MetaDataset(dataset)
        self.to_true_indices: list[int] = []
        indices: dict[Any, list[int]] = {}
        for label in labels:
            true = self.dataset.labels_to_indices.get(label)
            if true is None:
                raise ValueError(f"labels: expected labels of the data set, got {label!r}")
            if label in indices:
                raise ValueError(f"labels: expected distinct labels, got {label!r} twice")
            start = len(self.to_true_indices)
            indices[label] = list(range(start, start + len(true)))
            self.to_true_indices.extend(true)
        self._keep(indices, by_index(indices))

    def __getitem__(self, item: int) -> Any:
        return self.dataset[self.to_true_indices[item]]

    def __len__(self) -> int:
        return len(self.to_true_indices)
