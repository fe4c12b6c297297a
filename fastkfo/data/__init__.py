"""Few-shot tasks drawn from data sets, under learn2learn's names: its `data` in plain Python.

Source: the interface is learn2learn 0.2.0's `data` (https://github.com/learnables/learn2learn).
"""

from fastkfo.data import samplers, transforms
from fastkfo.data.meta_dataset import FilteredMetaDataset, MetaDataset, UnionMetaDataset
from fastkfo.data.task_dataset import DataDescription, TaskDataset, Taskset
from fastkfo.data.unpickling import UnsafePickleError
from fastkfo.data.utils import InfiniteIterator, OnDeviceDataset, partition_task

__all__ = [
    "DataDescription",
    "FilteredMetaDataset",
    "InfiniteIterator",
    "MetaDataset",
    "OnDeviceDataset",
    "TaskDataset",
    "Taskset",
    "UnionMetaDataset",
    "UnsafePickleError",
    "partition_task",
    "samplers",
    "transforms",
]
