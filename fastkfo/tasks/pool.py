"""Which images each class has, and draws from them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastkfo.tasks import draws

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Pool:
    """Images by class.

    Attributes:
        classes: The labels, in sorted order or as asked for; a row is a position in it.
        order: ``[N]`` images grouped by class, or None where they are already.
        starts: ``[classes]`` where each class begins.
        counts: ``[classes]`` how many images each has.
        largest: The largest count.
        even: Whether all counts are the same.
    """

    classes: tuple[int, ...]
    order: Tensor | None
    starts: Tensor
    counts: Tensor
    largest: int
    even: bool

    @classmethod
    def of(cls, labels: Tensor | Sequence[int], images: int, classes: Iterable[int] | None) -> Pool:
        """Groups images by their labels.

        Returns:
            The pool, on the CPU.

        Raises:
            TypeError: If labels or classes are no integers.
            ValueError: If labels are not one per image, or classes are repeated, unknown or none.
        """
        labels = _labels(labels)
        if len(labels) != images:
            raise ValueError(f"labels: expected {images}, one per image, got {len(labels)}")
        order = labels.argsort(stable=True)
        found, counts = labels.unique(return_counts=True)
        starts = counts.cumsum(0) - counts
        names = tuple(found.tolist())
        if classes is not None:
            wanted = _wanted(classes, names)
            row = {name: i for i, name in enumerate(names)}
            rows = torch.tensor([row[c] for c in wanted])
            names, counts, starts = wanted, counts[rows], starts[rows]
        grouped = bool((order == torch.arange(images)).all())
        largest = int(counts.max())
        even = bool((counts == largest).all())
        return cls(names, None if grouped else order, starts, counts, largest, even)

    def check(
        self, ways: int, shots: int, queries: int, copies: int, names: Sequence[str] = ()
    ) -> None:
        """Raises unless there are enough classes, with enough images each.

        Args:
            ways: Classes per task.
            shots: Support images per class.
            queries: Query images per class.
            copies: How many classes each class counts for.
            names: Of the classes, if they have any: label i is ``names[i]``.

        Raises:
            ValueError: If there are not.
        """
        available = len(self.classes) * copies
        if ways > available:
            raise ValueError(
                f"ways: expected at most {available}, the classes there are, got {ways}"
            )
        fewest, row = self.counts.min(0)
        if shots + queries > fewest:
            label = self.classes[int(row)]
            name = repr(names[label]) if 0 <= label < len(names) else label
            raise ValueError(
                f"shots + queries: expected at most {fewest}, the images of class "
                f"{name}, got {shots} + {queries} = {shots + queries}"
            )

    def to(self, device: torch.device) -> Pool:
        """The same on a device.

        Returns:
            A pool whose tensors are there.
        """
        order = None if self.order is None else self.order.to(device)
        return replace(
            self, order=order, starts=self.starts.to(device), counts=self.counts.to(device)
        )

    def draw(self, rows: Tensor, images: int, generator: torch.Generator) -> Tensor:
        """Draws distinct images of classes.

        Args:
            rows: ``[R]``, the classes.
            images: How many of each, k.
            generator: Where the randomness comes from.

        Returns:
            ``[R, k]``, positions among all images.
        """
        size = self.largest if self.even else self.counts.index_select(0, rows)
        members = draws.distinct(len(rows), size, images, self.largest, generator)
        members += self.starts.index_select(0, rows)[:, None]
        if self.order is None:
            return members
        return self.order.index_select(0, members.flatten()).view(members.shape)


def _labels(labels: Tensor | Sequence[int]) -> Tensor:
    try:
        tensor = torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"labels: expected integers, got {type(labels).__name__}") from error
    if tensor.dtype not in _INTEGERS and tensor.numel():
        raise TypeError(f"labels: expected integers, got {tensor.dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"labels: expected [N], got shape {list(tensor.shape)}")
    return tensor.long()


def _wanted(classes: Iterable[int], known: tuple[int, ...]) -> tuple[int, ...]:
    try:
        wanted = tuple(operator.index(c) for c in classes)
    except TypeError as error:
        raise TypeError(f"classes: expected integers, got {classes!r}") from error
    if not wanted:
        raise ValueError("classes: expected at least one, got none")
    if len(set(wanted)) != len(wanted):
        raise ValueError("classes: expected distinct labels, got some twice")
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise ValueError(f"classes: expected labels with images, got {unknown[:5]}")
    return wanted
