"""Splitting a task into support and query, data sets in memory, loops without end.

Source: the interface is learn2learn 0.2.0's `data.utils`
(https://github.com/learnables/learn2learn).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

__all__ = ["InfiniteIterator", "OnDeviceDataset", "partition_task"]

_Pair = tuple[Tensor, Tensor]


class InfiniteIterator:
    """Iterates again and again.

    Args:
        dataloader: What to iterate over.

    Attributes:
        dataloader: As given.
        iterator: The present round.

    Raises:
        ValueError: On `next`, if a whole round has nothing.

    Example:
        >>> batches = InfiniteIterator(DataLoader(data, batch_size=32))
        >>> x, y = next(batches)
    """

    def __init__(self, dataloader: Iterable[Any]) -> None:
        self.dataloader = dataloader
        self.iterator = iter(dataloader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        for _ in range(2):
            try:
                return next(self.iterator)
            except StopIteration:
                self.iterator = iter(self.dataloader)
        raise ValueError("dataloader: expected one with items that can be iterated over anew")


def partition_task(data: Tensor, labels: Tensor, shots: int = 1) -> tuple[_Pair, _Pair]:
    """Split a task: the first `shots` samples of each label are the support, the others the query.

    Both are grouped by label, labels ascending, samples in their order. Differentiable in `data`.

    Args:
        data: `[N, ...]`.
        labels: `[N]`, each of them as often.
        shots: Samples per label in the support.

    Returns:
        `(support_data, support_labels), (query_data, query_labels)`.

    Raises:
        ValueError: If the shapes do not fit, labels are not equally frequent, or there are fewer
            samples than `shots` of each.

    Example:
        >>> (x_s, y_s), (x_q, y_q) = partition_task(x, y, shots=5)
    """
    if labels.dim() != 1 or data.dim() < 1 or len(data) != len(labels):
        expected, got = tuple(data.shape[:1]), tuple(labels.shape)
        raise ValueError(f"labels: expected shape {expected}, one per sample, got {got}")
    values, counts = labels.unique(return_counts=True)
    per_label = int(counts[0]) if len(counts) else 0
    if not bool((counts == per_label).all()):
        found = dict(zip(values.tolist(), counts.tolist(), strict=True))
        raise ValueError(f"labels: expected as many samples of each, got {found}")
    if not 0 <= shots <= per_label:
        raise ValueError(f"shots: expected 0 to {per_label}, the samples per label, got {shots}")
    order = labels.argsort(stable=True).view(len(values), per_label)
    support, query = order[:, :shots].flatten(), order[:, shots:].flatten()
    x_s, x_q = (data.index_select(0, i.to(data.device)) for i in (support, query))
    return (x_s, labels[support]), (x_q, labels[query])


class OnDeviceDataset(TensorDataset):
    """A whole data set as tensors, on a device.

    On the CPU of a machine with CUDA, in pinned memory.

    Args:
        dataset: Samples `(x, y)`: tensors of one shape, and numbers.
        device: Where to put it. Default: the CPU.
        transform: Applied to x whenever a sample is taken.

    Attributes:
        tensors: `[N, ...]` and `[N]`.
        transform: As given.

    Raises:
        TypeError: If a sample's x is no tensor: give the data set a transform that makes it one.
        ValueError: If there are no samples, or their shapes differ.

    Example:
        >>> OnDeviceDataset(data, device="cuda")[0][0].device
        device(type='cuda', index=0)
    """

    _keeps_labels = True

    def __init__(
        self,
        dataset: Dataset[Any],
        device: torch.device | str | None = None,
        transform: Callable[[Tensor], Any] | None = None,
    ) -> None:
        samples: list[Tensor] = []
        labels = []
        for i in range(len(dataset)):  # type: ignore[arg-type]
            x, y = dataset[i]
            if not isinstance(x, Tensor):
                raise TypeError(f"dataset: expected tensors, got {type(x).__name__} at {i}")
            if samples and x.shape != samples[0].shape:
                raise ValueError(
                    f"dataset: expected shape {tuple(samples[0].shape)}, that of the first sample, "
                    f"got {tuple(x.shape)} at {i}"
                )
            samples.append(x)
            labels.append(y)
        if not samples:
            raise ValueError("dataset: expected at least one sample, got none")
        data, targets = torch.stack(samples).to(device), torch.tensor(labels).to(device)
        if data.device.type == "cpu" and torch.cuda.is_available():
            data, targets = data.pin_memory(), targets.pin_memory()
        super().__init__(data, targets)
        self.transform = transform
        if hasattr(dataset, "_bookkeeping_path"):
            self._bookkeeping_path = dataset._bookkeeping_path

    def __getitem__(self, index: Any) -> tuple[Any, ...]:
        x, y = super().__getitem__(index)
        return (x if self.transform is None else self.transform(x)), y
