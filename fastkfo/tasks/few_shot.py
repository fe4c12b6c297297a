"""Few-shot classification tasks from any labelled images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkfo.tasks import checks, draws
from fastkfo.tasks.augmentations import Augmentation
from fastkfo.tasks.distribution import Episodes, TaskDistribution
from fastkfo.tasks.loading import read_dataset, read_folder
from fastkfo.tasks.pool import Pool

__all__ = ["FewShotTasks"]


class FewShotTasks(TaskDistribution):
    """Balanced classification tasks: some classes, some images of each.

    A task has ``ways`` distinct classes in random order, labelled 0, 1, …, and of each class
    ``shots + queries`` distinct images; every ordered choice is as likely as any other. S = ways *
    shots, Q = ways * queries, and samples are grouped by class.

    Args:
        images: ``[N, ...]``, floating or uint8: images ``[N, C, H, W]``, features, anything. Held
            on the device as they are, not copied if they are there. What is uint8 stays so, and
            becomes floating, divided by 255, only after it was drawn.
        labels: ``[N]``, integers in any order and with gaps.
        ways: Classes per task.
        shots: Support images per class.
        queries: Query images per class.
        classes: Labels to draw from, of `split_classes` for example. Default: all of them.
        rotations: 1, or 4: every class at each of four rotations by 90 degrees (``torch.rot90``)
            is a class. Images must be ``[N, C, H, H]``.
        mix_rotations: Whether one task may hold a class at two rotations. By default it does not:
            distinct classes are drawn, then a rotation for each, as in learn2learn's Omniglot.
        augment: Called on all that was drawn, support and query alike, as floating
            ``[T * (S + Q), ...]``, and this object's generator; returns a tensor of that length.
            `fastkfo.tasks.augmentations` has some.
        names: Of the classes, for messages: label i is ``names[i]``. Default: labels have none.
        seed: Seeds this object's own generator; the global one is left alone.
        dtype: Of the images returned. Default: the images' own, or for uint8
            ``torch.get_default_dtype()``.
        device: Of everything returned, and where it is drawn. Default: that of the images.

    Raises:
        TypeError: If an option has the wrong type, labels are no integers, or images neither
            floating nor uint8.
        ValueError: If images and labels differ in length, a class is unknown or has too few images
            (the message names it), or there are fewer classes than ways.

    Example:
        >>> tasks = FewShotTasks(images, labels, ways=5, shots=1, queries=15, rotations=4)
        >>> x_s, y_s, x_q, y_q = tasks.sample(32)

    Source:
        O. Vinyals et al., "Matching Networks for One Shot Learning", NeurIPS 2016 (episodes);
        A. Santoro et al., "Meta-Learning with Memory-Augmented Neural Networks", ICML 2016
        (rotated classes).
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | Sequence[int],
        ways: int,
        shots: int,
        queries: int,
        *,
        classes: Iterable[int] | None = None,
        rotations: int = 1,
        mix_rotations: bool = False,
        augment: Augmentation | None = None,
        names: Sequence[str] = (),
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in (("ways", ways), ("shots", shots), ("queries", queries)):
            checks.count(name, value)
        checks.flag("mix_rotations", mix_rotations)
        if augment is not None and not callable(augment):
            raise TypeError(f"augment: expected a callable, got {type(augment).__name__}")
        _check_images(images, rotations)
        own = images.dtype if images.is_floating_point() else None
        self.dtype = checks.floating("dtype", own if dtype is None else dtype)
        super().__init__(seed=seed, device=images.device if device is None else device)
        self.ways, self.shots, self.queries = ways, shots, queries
        self.rotations, self.mix_rotations, self.augment = rotations, mix_rotations, augment

        pool = Pool.of(labels, len(images), classes)
        pool.check(ways, shots, queries, rotations if mix_rotations else 1, names)
        self.classes = pool.classes
        self._pool = pool.to(self.device)
        stored = images.dtype if images.dtype == torch.uint8 else self.dtype
        self._images = images.detach().to(self.device, stored)
        y = [torch.arange(ways, device=self.device).repeat_interleave(n) for n in (shots, queries)]
        self._y_s, self._y_q = y[0][None], y[1][None]

    @classmethod
    def from_dataset(
        cls, dataset: Any, ways: int, shots: int, queries: int, **options: Any
    ) -> FewShotTasks:
        """Tasks from a data set of (image, label), which is read once.

        Args:
            dataset: As `fastkfo.tasks.read_dataset` wants it.
            ways: Classes per task.
            shots: Support images per class.
            queries: Query images per class.
            options: The other options of `FewShotTasks`.

        Returns:
            The tasks. Errors are those of `read_dataset` and of `FewShotTasks`.

        Example:
            >>> FewShotTasks.from_dataset(dataset, 5, 1, 15, device="cuda")
        """
        images, labels, _ = read_dataset(dataset)
        return cls(images, labels, ways, shots, queries, **options)

    @classmethod
    def from_folder(
        cls,
        path: str | os.PathLike[str],
        ways: int,
        shots: int,
        queries: int,
        *,
        size: int | tuple[int, int] | None = None,
        channels: int = 3,
        classes: Iterable[str] | None = None,
        **options: Any,
    ) -> FewShotTasks:
        """Tasks from ``<path>/<class>/<image>``, kept as uint8.

        Args:
            path: The folder of folders.
            ways: Classes per task.
            shots: Support images per class.
            queries: Query images per class.
            size: Height and width to resize to, one number for both.
            channels: 1 (grey) or 3 (RGB).
            classes: Names of the folders to draw from. Default: all.
            options: The other options of `FewShotTasks`.

        Returns:
            The tasks. Errors are those of `fastkfo.tasks.read_folder` and of `FewShotTasks`.

        Example:
            >>> FewShotTasks.from_folder("omniglot", 5, 1, 15, size=28, channels=1, rotations=4)
        """
        images, labels, names = read_folder(path, size=size, channels=channels, classes=classes)
        return cls(images, labels, ways, shots, queries, **{"names": names, **options})

    def _draw(self, tasks: int) -> Episodes:
        rows, turns = self._draw_classes(tasks)  # [T * ways]
        chosen = self._pool.draw(rows, self.shots + self.queries, self._generator)
        x = self._images.index_select(0, self._in_order(chosen, tasks))
        if turns is not None:
            each = turns[:, None].expand(-1, self.shots + self.queries)
            x = _turned(x, self._in_order(each, tasks))
        if x.dtype != self.dtype:  # uint8
            x = x.to(self.dtype).div_(255)
        if self.augment is not None:
            x = _augmented(self.augment, x, self._generator)
        x_s, x_q = x.split([tasks * self._y_s.shape[1], tasks * self._y_q.shape[1]])
        return Episodes(
            x_s.unflatten(0, (tasks, -1)),
            self._y_s.expand(tasks, -1).contiguous(),
            x_q.unflatten(0, (tasks, -1)),
            self._y_q.expand(tasks, -1).contiguous(),
        )

    def _draw_classes(self, tasks: int) -> tuple[Tensor, Tensor | None]:
        """Rows of the pool [T * ways], and quarter turns for each, or None."""
        count = len(self.classes) * (self.rotations if self.mix_rotations else 1)
        drawn = draws.distinct(tasks, count, self.ways, count, self._generator).reshape(-1)
        if self.rotations == 1:
            return drawn, None
        if self.mix_rotations:
            return drawn // self.rotations, drawn % self.rotations
        turns = torch.randint(
            self.rotations, drawn.shape, generator=self._generator, device=self.device
        )
        return drawn, turns

    def _in_order(self, of_class: Tensor, tasks: int) -> Tensor:
        """[T * ways, shots + queries] as all of the support, then all of the queries.

        Both are then parts of one tensor that was gathered and augmented once.

        Returns:
            The same numbers, ``[T * (S + Q)]``.
        """
        parts = of_class.view(tasks, self.ways, -1).split([self.shots, self.queries], 2)
        return torch.cat([part.flatten() for part in parts])


def _augmented(augment: Augmentation, x: Tensor, generator: torch.Generator) -> Tensor:
    found = augment(x, generator)
    if not isinstance(found, Tensor) or found.shape[:1] != x.shape[:1]:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"augment: expected [{len(x)}, ...] back, got {shape}")
    return found


def _check_images(images: Tensor, rotations: int) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(f"images: expected a floating dtype or uint8, got {images.dtype}")
    checks.integer("rotations", rotations)
    if rotations not in (1, 4):
        raise ValueError(f"rotations: expected 1 or 4, got {rotations}")
    if images.dim() == 0 or images.numel() == 0:
        raise ValueError(f"images: expected [N, ...] of some size, got {list(images.shape)}")
    if rotations == 4 and (images.dim() != 4 or images.shape[2] != images.shape[3]):
        raise ValueError(f"images: expected [N, C, H, H], to be rotated, got {list(images.shape)}")


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Each image [B, C, H, H] rotated by its number of quarter turns, which is two bits."""
    turns = turns.view(-1, 1, 1, 1)
    x = torch.where(turns % 2 == 1, x.rot90(1, (2, 3)), x)
    return torch.where(turns >= 2, x.flip(2, 3), x)
