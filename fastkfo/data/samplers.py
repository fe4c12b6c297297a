"""Tasks as batches of a `DataLoader` over the data set.

Source: the interface is learn2learn 0.2.0's `data.samplers`
(https://github.com/learnables/learn2learn).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from torch.utils.data import Sampler

from fastkfo.data.descriptions import TaskDescription
from fastkfo.data.task_dataset import Taskset

__all__ = ["TasksetSampler"]


class TasksetSampler(Sampler[list[int]]):
    """The indices of each task's samples: a `batch_sampler`.

    What a task's transforms do besides choosing samples (renaming labels, loading) is left out.

    Args:
        taskset: The tasks. Those of a finite set are drawn once, as by the set itself.
        shuffle: Whether a finite set's tasks come in random order.

    Example:
        >>> loader = DataLoader(dataset, batch_sampler=TasksetSampler(taskset))
    """

    def __init__(self, taskset: Taskset, shuffle: bool = True) -> None:
        self.taskset = taskset
        self.shuffle = shuffle

    def description2indices(self, task_description: TaskDescription) -> list[int]:
        """Return the indices of a task's samples.

        Args:
            task_description: The task.

        Returns:
            Its indices, in order.
        """
        return [described.index for described in task_description]

    def __len__(self) -> int:
        return len(self.taskset)

    def __iter__(self) -> Iterator[list[int]]:
        tasks = self.taskset
        if tasks.num_tasks == -1:
            while True:
                yield self.description2indices(tasks.sample_task_description())
        order = list(range(tasks.num_tasks))
        if self.shuffle:
            random.shuffle(order)
        for i in order:
            if i not in tasks.sampled_descriptions:
                tasks.sampled_descriptions[i] = tasks.sample_task_description()
            yield self.description2indices(tasks.sampled_descriptions[i])
