"""Rotations as new classes.

Source: the interface is learn2learn 0.2.0's `vision.transforms`
(https://github.com/learnables/learn2learn).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastkfo.data.descriptions import TaskDescription, TaskTransform
from fastkfo.functional.checks import finite

__all__ = ["RandomClassRotation", "rotated"]


class RandomClassRotation(TaskTransform):
    """Rotates all images of a class alike: each class of a task by a random one of some angles.

    Draws are from Python's global `random`, in the order in which the classes occur in the task, as
    in learn2learn; there, all classes are then rotated by the last angle drawn.

    Args:
        dataset: A `MetaDataset`. Its images are tensors `[..., H, W]` or Pillow's.
        degrees: The angles, counter-clockwise.

    Raises:
        TypeError: If `dataset` is no `MetaDataset`, `degrees` no sequence, or an angle no number.
        ValueError: If `degrees` is empty, or an angle is not finite.

    Example:
        >>> transform = RandomClassRotation(dataset, [0, 90, 180, 270])
    """

    def __init__(self, dataset: Any, degrees: Sequence[float]) -> None:
        super().__init__(dataset)
        if not isinstance(degrees, Sequence):
            raise TypeError(f"degrees: expected a sequence, got {type(degrees).__name__}")
        if not degrees:
            raise ValueError("degrees: expected at least one angle, got none")
        for i, angle in enumerate(degrees):
            finite(f"degrees[{i}]", angle)
        self.degrees = degrees

    def __call__(self, task_description: TaskDescription | None) -> TaskDescription:
        """Add the rotation to every description."""
        task_description = self.new_task() if task_description is None else task_description
        rotations: dict[Any, Any] = {}
        for described in task_description:
            label = self.dataset.indices_to_labels[described.index]
            if label not in rotations:
                rotations[label] = partial(_rotated_sample, random.choice(self.degrees))
            described.transforms.append(rotations[label])
        return task_description


def _rotated_sample(degrees: float, sample: Any) -> tuple[Any, ...]:
    return rotated(sample[0], degrees), *sample[1:]


def rotated(image: Any, degrees: float) -> Any:
    """Rotate an image about its centre; it keeps its size, and is zero where nothing came from.

    Quarter turns of square images are exact. Other angles take the nearest pixel.

    Args:
        image: A tensor `[..., H, W]`, or a Pillow image.
        degrees: Counter-clockwise.

    Returns:
        The image rotated.

    Raises:
        TypeError: If it is neither.

    Example:
        >>> rotated(torch.tensor([[1, 2], [3, 4]]), 90)
        tensor([[2, 4],
                [1, 3]])
    """
    if not isinstance(image, Tensor):
        if not hasattr(image, "rotate"):
            raise TypeError(f"image: expected a tensor or an image, got {type(image).__name__}")
        return image.rotate(degrees)
    height, width = image.shape[-2:]
    turns, rest = divmod(degrees, 90)
    if rest == 0 and (turns % 2 == 0 or height == width):
        return torch.rot90(image, int(turns) % 4, (-2, -1))
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y = torch.arange(height, device=image.device, dtype=torch.float64)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=image.device, dtype=torch.float64) - (width - 1) / 2
    # Where each pixel comes from; y points down.
    row = (y * cos + x * sin + (height - 1) / 2).round().long()
    column = (x * cos - y * sin + (width - 1) / 2).round().long()
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    found = image[..., row.clamp(0, height - 1), column.clamp(0, width - 1)]
    return found.where(inside, torch.zeros((), dtype=image.dtype, device=image.device))
