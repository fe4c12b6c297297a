"""Standard few-shot benchmarks: their data, splits and tasks.

Source: the interface is learn2learn 0.2.0's `vision.benchmarks`
(https://github.com/learnables/learn2learn).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastkfo.data.task_dataset import Taskset
from fastkfo.vision.benchmarks.cifarfs_benchmark import cifarfs_tasksets
from fastkfo.vision.benchmarks.mini_imagenet_benchmark import mini_imagenet_tasksets
from fastkfo.vision.benchmarks.omniglot_benchmark import omniglot_tasksets

__all__ = [
    "BenchmarkTasksets",
    "cifarfs_tasksets",
    "get_tasksets",
    "list_tasksets",
    "mini_imagenet_tasksets",
    "omniglot_tasksets",
]

_TASKSETS: dict[str, Callable[..., Any]] = {
    "omniglot": omniglot_tasksets,
    "mini-imagenet": mini_imagenet_tasksets,
    "cifarfs": cifarfs_tasksets,
}
_OTHER_NAMES = {"cifar-fs": "cifarfs"}


class BenchmarkTasksets(NamedTuple):
    """The tasks of a benchmark.

    Attributes:
        train: Those to train on.
        validation: Those to choose by.
        test: Those to report.
    """

    train: Taskset
    validation: Taskset
    test: Taskset


def list_tasksets() -> list[str]:
    """Return the names of the benchmarks, as `get_tasksets` takes them."""
    return list(_TASKSETS)


def get_tasksets(
    name: str,
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    num_tasks: int = -1,
    root: str = "~/data",
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> BenchmarkTasksets:
    """Return a benchmark's tasks: `x`, and labels `y` in 0, …, ways − 1, grouped by class.

    For as many support as query samples, ask for twice as many, and take the support at positions
    `2 * arange(shots * ways)`.

    Args:
        name: `"omniglot"`, `"mini-imagenet"` or `"cifarfs"` (also `"cifar-fs"`).
        train_ways: Classes per training task.
        train_samples: Samples per class of a training task, support and query together.
        test_ways: Classes per validation or test task.
        test_samples: Samples per class of these.
        num_tasks: How many tasks each of the three has; -1 for no end.
        root: The folder with the data; `docs/data.md` says how they lie there.
        device: Where to put all images, at once; None to load each when it is needed.
        **kwargs: Options of one benchmark: mini-ImageNet's `data_augmentation`.

    Returns:
        The tasks of train, validation and test.

    Raises:
        TypeError: If there is an option that the benchmark does not have.
        ValueError: If there is no benchmark of that name, not as many classes as ways, or a class
            with fewer images than samples.
        FileNotFoundError: If data are not there; the message says what to put where.

    Example:
        >>> tasks = get_tasksets("cifarfs", train_samples=10, root="~/data")
        >>> x, y = tasks.train.sample()  # [50, 3, 32, 32], [50]
    """
    made = _TASKSETS.get(_OTHER_NAMES.get(name, name))
    if made is None:
        raise ValueError(f"name: expected one of {', '.join(list_tasksets())}, got {name!r}")
    datasets, transforms = made(
        train_ways=train_ways,
        train_samples=train_samples,
        test_ways=test_ways,
        test_samples=test_samples,
        root=os.path.expanduser(root),
        device=device,
        **kwargs,
    )
    tasks = [
        Taskset(dataset, task_transforms=steps, num_tasks=num_tasks)
        for dataset, steps in zip(datasets, transforms, strict=True)
    ]
    return BenchmarkTasksets(*tasks)
