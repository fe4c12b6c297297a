"""Augmentation of images that are tensors, for where torchvision is not installed.

Images are `[C, H, W]`, from 0 to 1. Draws are from torch's global generator. Each class has the
meaning of torchvision's of that name, whose objects can be used in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ColorJitter", "Compose", "Normalize", "RandomCrop", "RandomHorizontalFlip"]

_GREY = (0.2989, 0.587, 0.114)


class Compose:
    """One transform after the other.

    Args:
        transforms: Functions of one argument.
    """

    def __init__(self, transforms: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: Tensor) -> Tensor:
        """Apply them."""
        for transform in self.transforms:
            image = transform(image)
        return image


class Normalize:
    """(x − mean) / std, channel by channel.

    Args:
        mean: C numbers.
        std: C numbers.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = list(mean), list(std)

    def __call__(self, image: Tensor) -> Tensor:
        """Normalise."""
        mean, std = image.new_tensor(self.mean), image.new_tensor(self.std)
        return (image - mean[:, None, None]) / std[:, None, None]


class RandomCrop:
    """A random square of an image that zeros were put around.

    Args:
        size: Of the square's edge.
        padding: Zeros at each edge.

    Raises:
        ValueError: When called, if the image with its zeros is smaller than the square.
    """

    def __init__(self, size: int, padding: int = 0) -> None:
        self.size, self.padding = size, padding

    def __call__(self, image: Tensor) -> Tensor:
        """Crop."""
        padded = F.pad(image, [self.padding] * 4)
        room = [edge - self.size for edge in padded.shape[-2:]]
        if min(room) < 0:
            raise ValueError(
                f"image: expected edges of at least {self.size - 2 * self.padding}, "
                f"got {tuple(image.shape)}"
            )
        top, left = (int(torch.randint(0, space + 1, ())) for space in room)
        return padded[..., top : top + self.size, left : left + self.size]


class RandomHorizontalFlip:
    """Mirrors left and right, or not.

    Args:
        p: How probably.
    """

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: Tensor) -> Tensor:
        """Flip or not."""
        return image.flip(-1) if float(torch.rand(())) < self.p else image


class ColorJitter:
    """Changes brightness, contrast and saturation, in random order, each by a random factor.

    A factor f, uniform in [max(0, 1 − v), 1 + v], makes f x + (1 − f) r, cut to [0, 1], where r is
    black, the mean of the grey image, or the grey image.

    Args:
        brightness: v of the brightness.
        contrast: v of the contrast.
        saturation: v of the saturation.
    """

    def __init__(
        self, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0
    ) -> None:
        self.brightness, self.contrast, self.saturation = brightness, contrast, saturation

    def __call__(self, image: Tensor) -> Tensor:
        """Change an image of three channels."""
        steps = (
            (self.brightness, torch.zeros_like),
            (self.contrast, lambda x: _grey(x).mean()),
            (self.saturation, _grey),
        )
        for i in torch.randperm(len(steps)).tolist():
            most, reference = steps[i]
            if most > 0:
                low = max(0.0, 1 - most)
                factor = low + (1 + most - low) * float(torch.rand(()))
                image = (factor * image + (1 - factor) * reference(image)).clamp(0, 1)
        return image


def _grey(image: Tensor) -> Tensor:
    """`[3, H, W]` to `[1, H, W]`."""
    return (image * image.new_tensor(_GREY)[:, None, None]).sum(0, keepdim=True)
