"""The steps by which tasks are drawn: from a list of `DataDescription` to another.

Draws are from Python's global `random`, in learn2learn's order: the same seed gives its tasks.

Source: the interface is learn2learn 0.2.0's `data.transforms`
(https://github.com/learnables/learn2learn), which is compiled there.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import Any

from fastkfo.data.descriptions import DataDescription, TaskDescription, TaskTransform
from fastkfo.data.meta_dataset import MetaDataset
from fastkfo.data.pools import Pools, describe, whole
from fastkfo.functional.checks import positive

__all__ = [
    "ConsecutiveLabels",
    "DataDescription",
    "FilterLabels",
    "FusedNWaysKShots",
    "KShots",
    "LoadData",
    "NWays",
    "RemapLabels",
    "TaskTransform",
]


class Narrowing(TaskTransform):
    """A step that chooses among samples, class by class; subclasses define `narrow`."""

    _whole: Pools | None = None

    def narrow(self, pools: Pools | None) -> Pools:
        """Choose from pools, or from all samples; the pools given are left as they are."""
        raise NotImplementedError

    def __call__(self, task_description: TaskDescription | None) -> TaskDescription:
        """Choose from a task's samples, or from all."""
        if task_description is None:
            return describe(self.narrow(None))
        label_of = self.dataset.indices_to_labels
        pools: dict[Any, list[DataDescription]] = {}
        for described in task_description:
            pools.setdefault(label_of[described.index], []).append(described)
        kept = self.narrow(Pools(pools, grouped=False))
        if kept.grouped:
            return list(chain.from_iterable(kept.of.values()))
        return [d for d in task_description if label_of[d.index] in kept.of]

    def all_samples(self) -> Pools:
        """All of the data set, sorted once."""
        if self._whole is None:
            self._whole = whole(self.dataset)
        return self._whole


class FilterLabels(Narrowing):
    """Keeps the samples that have one of some labels.

    Args:
        dataset: A `MetaDataset`.
        labels: The labels. Those that the data set does not have are ignored.

    Raises:
        TypeError: If `dataset` is no `MetaDataset`.
        ValueError: If it has none of the labels.
    """

    def __init__(self, dataset: Any, labels: Iterable[Any]) -> None:
        super().__init__(dataset)
        self.labels = list(labels)
        kept = set(self.labels)
        of = {label: pool for label, pool in self.all_samples().of.items() if label in kept}
        if not of:
            raise ValueError(f"labels: expected labels of the data set, got {_some(self.labels)}")
        self._kept = kept
        self._whole = Pools(of, grouped=False)

    def narrow(self, pools: Pools | None) -> Pools:
        """Leave pools of other labels out."""
        if pools is None:
            return self.all_samples()
        kept = {label: pool for label, pool in pools.of.items() if label in self._kept}
        return Pools(kept, pools.grouped)


class NWays(Narrowing):
    """Keeps the samples of n random labels.

    Args:
        dataset: A `MetaDataset`.
        n: How many labels, the ways.

    Raises:
        TypeError: If `dataset` is no `MetaDataset`, or `n` no int.
        ValueError: If `n` is below 1, or the data set, or later a task, has fewer labels.
    """

    def __init__(self, dataset: Any, n: int = 2) -> None:
        super().__init__(dataset)
        positive("n", n)
        _enough("n", n, dataset.labels)
        self.n = n

    def narrow(self, pools: Pools | None) -> Pools:
        """Leave n pools."""
        if pools is None:
            of = self.dataset.labels_to_indices
            chosen = random.sample(self.dataset.labels, k=self.n)
            return Pools({label: of[label] for label in chosen}, grouped=True)
        _enough("n", self.n, list(pools.of))
        # learn2learn draws from a set, whose order depends on that of the insertions.
        drawn = set(random.sample(list(set(list(pools.of))), k=self.n))  # noqa: C414
        return Pools({y: pool for y, pool in pools.of.items() if y in drawn}, pools.grouped)


class KShots(Narrowing):
    """Keeps k random samples of each label. The task is grouped by label from here on.

    Args:
        dataset: A `MetaDataset`.
        k: How many samples per label: the shots, of support and query together.
        replacement: Whether a sample can come twice.

    Raises:
        TypeError: If `dataset` is no `MetaDataset`, or `k` no int.
        ValueError: If `k` is below 1, or later, without replacement, a label has fewer samples.
    """

    def __init__(self, dataset: Any, k: int = 1, replacement: bool = False) -> None:
        super().__init__(dataset)
        positive("k", k)
        self.k = k
        self.replacement = replacement

    def narrow(self, pools: Pools | None) -> Pools:
        """Leave k samples in every pool."""
        pools = self.all_samples() if pools is None else pools
        if self.replacement:
            # What comes twice is two samples, each with its own transforms.
            of = {
                label: [copy.deepcopy(drawn) for drawn in random.choices(pool, k=self.k)]
                for label, pool in pools.of.items()
            }
        else:
            of = {label: _drawn(label, pool, self.k) for label, pool in pools.of.items()}
        return Pools(of, grouped=True)


class FusedNWaysKShots(Narrowing):
    """`FilterLabels`, `NWays` and `KShots` in one.

    Args:
        dataset: A `MetaDataset`.
        n: How many labels, the ways.
        k: How many samples per label: the shots, of support and query together.
        replacement: Whether a sample can come twice.
        filter_labels: The labels to draw from, distinct; None for all.

    Raises:
        TypeError: If `dataset` is no `MetaDataset`, or `n` or `k` no int.
        ValueError: If `n` or `k` is below 1, there are fewer labels than `n`, the data set does not
            have one of `filter_labels`, one of them comes twice, or later a label has too few
            samples and there is no replacement.
    """

    def __init__(
        self,
        dataset: Any,
        n: int = 2,
        k: int = 1,
        replacement: bool = False,
        filter_labels: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(dataset)
        labels = dataset.labels if filter_labels is None else list(filter_labels)
        unknown = [label for label in labels if label not in dataset.labels_to_indices]
        if unknown:
            raise ValueError(
                f"filter_labels: expected labels of the data set, got {_some(unknown)}"
            )
        if len(set(labels)) != len(labels):
            raise ValueError(f"filter_labels: expected distinct labels, got {_some(labels)}")
        self.filter = FilterLabels(dataset, labels)
        self.nways = NWays(dataset, n)
        self.kshots = KShots(dataset, k, replacement)
        _enough("n", n, labels)
        self.n, self.k, self.replacement, self.filter_labels = n, k, replacement, labels

    def narrow(self, pools: Pools | None) -> Pools:
        """Leave k samples in each of n pools."""
        if pools is not None:
            return self.kshots.narrow(self.nways.narrow(self.filter.narrow(pools)))
        of = self.dataset.labels_to_indices
        found: dict[Any, list[int]] = {}
        for label in random.sample(self.filter_labels, k=self.n):
            if self.replacement:
                found[label] = [random.choice(of[label]) for _ in range(self.k)]
            else:
                found[label] = _drawn(label, of[label], self.k)
        return Pools(found, grouped=True)


class LoadData(TaskTransform):
    """Loads every sample: from its index to `dataset[index]`.

    Args:
        dataset: A `MetaDataset`.

    Raises:
        TypeError: If `dataset` is no `MetaDataset`.
    """

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        # The detour through a plain MetaDataset costs more than the rest of a small sample.
        inner = dataset.dataset if type(dataset) is MetaDataset else dataset
        self._load = inner.__getitem__

    def __call__(self, task_description: TaskDescription | None) -> TaskDescription:
        """Add the loading to every description."""
        task_description = self.new_task() if task_description is None else task_description
        for described in task_description:
            described.transforms.append(self._load)
        return task_description


class RemapLabels(TaskTransform):
    """Renames the labels of a task to 0, …, ways − 1; samples are lists from here on.

    Args:
        dataset: A `MetaDataset`.
        shuffle: Whether in random order.

    Raises:
        TypeError: If `dataset` is no `MetaDataset`.
        ValueError: When a sample is loaded whose label is not what the data set said.
    """

    def __init__(self, dataset: Any, shuffle: bool = True) -> None:
        super().__init__(dataset)
        self.shuffle = shuffle

    def __call__(self, task_description: TaskDescription | None) -> TaskDescription:
        """Add the renaming to every description."""
        task_description = self.new_task() if task_description is None else task_description
        label_of = self.dataset.indices_to_labels
        labels = list({label_of[described.index] for described in task_description})
        if self.shuffle:
            random.shuffle(labels)
        # Unlike a closure, this pickles.
        renamed = partial(_renamed, {label: i for i, label in enumerate(labels)})
        for described in task_description:
            described.transforms.append(renamed)
        return task_description


class ConsecutiveLabels(TaskTransform):
    """Sorts the samples of a task by the data set's labels, and keeps their order within each.

    Args:
        dataset: A `MetaDataset`.

    Raises:
        TypeError: If `dataset` is no `MetaDataset`.
    """

    def __call__(self, task_description: TaskDescription | None) -> TaskDescription:
        """Sort the descriptions."""
        task_description = self.new_task() if task_description is None else task_description
        label_of = self.dataset.indices_to_labels
        labels = [label_of[described.index] for described in task_description]
        order = sorted(range(len(labels)), key=labels.__getitem__)
        return [task_description[i] for i in order]


def _renamed(places: dict[Any, int], sample: Any) -> list[Any]:
    """Give a sample its place among the task's labels."""
    renamed = list(sample)
    label = renamed[1]
    place = places.get(label)
    if place is None:  # tensors are equal to a number, but no key for it
        place = places.get(label.item() if hasattr(label, "item") else label)
    if place is None:
        raise ValueError(
            f"dataset: expected one of the task's labels {_some(list(places))} from a sample, "
            f"got {label!r}"
        )
    renamed[1] = place
    return renamed


_NARROWING = (FilterLabels, NWays, KShots, FusedNWaysKShots)


def narrows(transform: object) -> bool:
    """Whether a step may be run on pools. Not a subclass: it may do anything else, too."""
    return type(transform) in _NARROWING


def _drawn(label: Any, pool: list[Any], k: int) -> list[Any]:
    if len(pool) < k:
        raise ValueError(
            f"k: expected at most {len(pool)}, the samples of label {label!r} (or "
            f"replacement=True), got {k}"
        )
    return random.sample(pool, k=k)


def _enough(name: str, n: int, labels: list[Any]) -> None:
    if n > len(labels):
        raise ValueError(f"{name}: expected at most {len(labels)}, the labels there are, got {n}")


def _some(labels: list[Any]) -> str:
    shown = ", ".join(repr(label) for label in labels[:5])
    return f"[{shown}{', ...' if len(labels) > 5 else ''}]"
