"""What a task is before its data are loaded: a list of samples, and what to do with each."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

__all__ = ["DataDescription", "TaskDescription", "TaskTransform"]


class DataDescription:
    """One sample of a task.

    Args:
        index: Of the sample in the data set.

    Attributes:
        index: As given.
        transforms: What is done one after the other, to the index first.

    Raises:
        TypeError: If `index` is no integer.
    """

    __slots__ = ("index", "transforms")

    def __init__(self, index: int) -> None:
        self.index: int = index if type(index) is int else _integer(index)
        self.transforms: list[Callable[[Any], Any]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> DataDescription:
        # Transforms may hold the data set, of which nobody wants a copy.
        copied = DataDescription(self.index)
        copied.transforms = list(self.transforms)
        return copied

    def __repr__(self) -> str:
        return f"DataDescription({self.index}, {len(self.transforms)} transforms)"


def _integer(index: Any) -> int:
    if not isinstance(index, Integral):
        raise TypeError(f"index: expected an int, got {type(index).__name__}")
    return int(index)


TaskDescription = list[DataDescription]


class TaskTransform:
    """A step in drawing a task: from a list of `DataDescription` to another.

    Subclasses define `__call__(task_description)`, where None means all samples, see `new_task`.

    Args:
        dataset: A `MetaDataset`.

    Raises:
        TypeError: If `dataset` does not say which sample has which label.
    """

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "indices_to_labels") or not hasattr(dataset, "labels_to_indices"):
            raise TypeError(f"dataset: expected a MetaDataset, got {type(dataset).__name__}")
        self.dataset = dataset

    def new_task(self) -> TaskDescription:
        """Describe all samples of the data set, in order.

        Returns:
            One description per sample.
        """
        return [DataDescription(i) for i in range(len(self.dataset))]
