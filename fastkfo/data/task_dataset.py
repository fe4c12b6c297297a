"""Tasks drawn from a data set.

Source: the interface is learn2learn 0.2.0's `data.task_dataset`
(https://github.com/learnables/learn2learn), which is compiled there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from operator import index as as_index
from typing import Any

from torch.utils.data import Dataset, default_collate

from fastkfo.data.descriptions import DataDescription, TaskDescription, TaskTransform
from fastkfo.data.meta_dataset import MetaDataset
from fastkfo.data.pools import Pools, describe
from fastkfo.data.transforms import narrows
from fastkfo.utils import warn_once

__all__ = ["DataDescription", "TaskDataset", "Taskset"]

_Transforms = Sequence[Callable[[Any], Any]] | Callable[[Any], Any]


class Taskset(Dataset[Any]):
    """Tasks drawn from a data set, each when it is first asked for.

    A task is a list of `DataDescription`s, which `task_transforms` draw one after the other. Its
    samples are then loaded and collated. Tasks are drawn from Python's global `random`: the same
    seed gives learn2learn's tasks.

    Args:
        dataset: A data set; if it is no `MetaDataset`, it becomes one.
        task_transforms: From a task description (None at first: all samples) to one; a list of
            such, or one function. None for the whole data set.
        num_tasks: How many tasks there are; the one at an index is always the same. With -1 every
            access draws another, iteration does not end, and the length is 1.
        task_collate: From the list of a task's samples to the task. Default: torch's
            `default_collate`.

    Attributes:
        sampled_descriptions: The tasks drawn so far, by index. Empty if `num_tasks` is -1.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If `num_tasks` is 0 or below -1.

    Example:
        >>> dataset = MetaDataset(data)
        >>> transforms = [NWays(dataset, 5), KShots(dataset, 2), LoadData(dataset)]
        >>> x, y = Taskset(dataset, transforms, num_tasks=20000).sample()
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        task_transforms: _Transforms | None = None,
        num_tasks: int = -1,
        task_collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        _check(num_tasks, task_transforms, task_collate)
        self.dataset = dataset if isinstance(dataset, MetaDataset) else MetaDataset(dataset)
        self.task_transforms: _Transforms = [] if task_transforms is None else task_transforms
        self.num_tasks = as_index(num_tasks)
        self.task_collate = default_collate if task_collate is None else task_collate
        self.sampled_descriptions: dict[int, TaskDescription] = {}
        self._task_id = 0

    def sample_task_description(self) -> TaskDescription:
        """Draw a task: what to load, and not yet any data.

        Returns:
            Its samples' descriptions.
        """
        if callable(self.task_transforms):
            return _checked(self.task_transforms(None), self.dataset)
        description, left = _narrowed(self.task_transforms)
        for transform in left:
            description = transform(description)
        return _checked(description, self.dataset)

    def get_task(self, task_description: TaskDescription) -> Any:
        """Load a task.

        Args:
            task_description: Its samples' descriptions.

        Returns:
            What `task_collate` makes of its samples.

        Raises:
            ValueError: If it has no samples.
        """
        if not task_description:
            raise ValueError("task_transforms: expected a task with samples, got one without")
        samples: list[Any] = []
        for described in task_description:
            data = described.index
            for transform in described.transforms:
                data = transform(data)
            samples.append(data)
        return self.task_collate(samples)

    def sample(self) -> Any:
        """Draw the index of a task at random, and load it.

        Returns:
            The task.
        """
        return self[random.randint(0, len(self) - 1)]

    def __len__(self) -> int:
        return 1 if self.num_tasks == -1 else self.num_tasks

    def __getitem__(self, i: int) -> Any:
        if self.num_tasks == -1:
            return self.get_task(self.sample_task_description())
        place = as_index(i)
        place += self.num_tasks if place < 0 else 0
        if not 0 <= place < self.num_tasks:
            raise IndexError(f"i: expected less than {self.num_tasks}, the tasks, got {i}")
        if place not in self.sampled_descriptions:
            self.sampled_descriptions[place] = self.sample_task_description()
        return self.get_task(self.sampled_descriptions[place])

    def __iter__(self) -> Iterator[Any]:
        """Iterate over all tasks, from the first, also if another iteration is under way."""
        self._task_id = 0
        return self._tasks()

    def _tasks(self) -> Iterator[Any]:
        i = 0
        while self.num_tasks == -1 or i < self.num_tasks:
            yield self[i]
            i += 1

    def __next__(self) -> Any:
        """Return the task after the last that `next` returned, counted from the last `iter`."""
        if self.num_tasks == -1:
            return self[0]
        if self._task_id >= self.num_tasks:
            raise StopIteration
        self._task_id += 1
        return self[self._task_id - 1]

    def __add__(self, other: Any) -> Any:
        raise NotImplementedError("sets of tasks cannot be added")


class TaskDataset(Taskset):
    """`Taskset` under its older name; says so once.

    Args:
        *args: See `Taskset`.
        **kwargs: See `Taskset`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        warn_once("TaskDataset is deprecated, use Taskset instead.", severity="deprecation")


def _narrowed(
    transforms: Sequence[Callable[[Any], Any]],
) -> tuple[TaskDescription | None, Sequence[Callable[[Any], Any]]]:
    """Run the transforms at the start that only choose samples; return what is left to run."""
    # Described is what they leave, not the whole data set, or whole classes, in between.
    pools: Pools | None = None
    done = 0
    for transform in transforms:
        if not narrows(transform) or transform.dataset is not transforms[0].dataset:  # type: ignore[attr-defined]
            break
        pools = transform.narrow(pools)  # type: ignore[attr-defined]
        done += 1
    return None if pools is None else describe(pools), transforms[done:]


def _check(num_tasks: object, task_transforms: object, task_collate: object) -> None:
    if isinstance(num_tasks, bool) or not isinstance(num_tasks, Integral):
        raise TypeError(f"num_tasks: expected an int, got {type(num_tasks).__name__}")
    if num_tasks < -1 or num_tasks == 0:
        raise ValueError(f"num_tasks: expected -1 (no end) or at least 1, got {num_tasks}")
    functions = {"task_collate": task_collate}
    if isinstance(task_transforms, Sequence):
        functions |= {f"task_transforms[{i}]": each for i, each in enumerate(task_transforms)}
    else:
        functions["task_transforms"] = task_transforms
    for name, function in functions.items():
        if not callable(function) and (function is not None or "[" in name):
            raise TypeError(f"{name}: expected a function, got {type(function).__name__}")


def _checked(description: Any, dataset: MetaDataset) -> TaskDescription:
    if description is None:
        return TaskTransform(dataset).new_task()
    if not isinstance(description, list):
        got = type(description).__name__
        raise TypeError(f"task_transforms: expected lists of DataDescription from them, got {got}")
    return description
