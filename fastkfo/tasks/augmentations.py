"""Random changes of a batch of images, another one for every image, on the images' device.

Each is a callable of images ``[B, C, H, W]`` (floating) and the generator to draw from, which is
what ``FewShotTasks(augment=...)`` wants. None changes its input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fastkfo.tasks import checks

__all__ = ["Augmentation", "ColorJitter", "Compose", "HorizontalFlip", "Normalize", "RandomCrop"]

Augmentation = Callable[[Tensor, Generator], Tensor]


class Compose:
    """One augmentation after the other.

    Args:
        augmentations: In the order in which they are applied.

    Raises:
        TypeError: If one of them cannot be called.

    Example:
        >>> augment = Compose(RandomCrop(4), HorizontalFlip(), Normalize((0.5,), (0.25,)))
    """

    def __init__(self, *augmentations: Augmentation) -> None:
        for index, one in enumerate(augmentations):
            if not callable(one):
                raise TypeError(
                    f"augmentations[{index}]: expected a callable of images and a generator, got "
                    f"{type(one).__name__}"
                )
        self.augmentations = augmentations

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Applies all of them.

        Returns:
            What the last one returns.
        """
        for one in self.augmentations:
            images = one(images, generator)
        return images


@dataclass(frozen=True)
class RandomCrop:
    """Pads on every side, then cuts the original size out at a random place.

    Attributes:
        padding: Pixels on every side; each of the ``(2 padding + 1)²`` places is as likely.
        fill: The value of the padding.

    Raises:
        TypeError: If padding is no integer.
        ValueError: If padding is below 1.
    """

    padding: int
    fill: float = 0.0

    def __post_init__(self) -> None:
        checks.count("padding", self.padding)

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Crops every image at a place of its own.

        Returns:
            As ``images``.
        """
        b, _, h, w = _shape(images)
        padded = F.pad(images, [self.padding] * 4, value=self.fill)
        windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # [B, C, 2p + 1, 2p + 1, H, W], a view
        top, left = torch.randint(
            2 * self.padding + 1, (2, b), generator=generator, device=images.device
        )
        return windows[torch.arange(b, device=images.device), :, top, left]


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirrors an image, left to right, with a probability.

    Attributes:
        p: The probability.

    Raises:
        TypeError: If p is no number.
        ValueError: If p is not in [0, 1].
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        checks.at_least_zero("p", self.p)
        if self.p > 1:
            raise ValueError(f"p: expected at most 1, got {self.p}")

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Flips some of the images.

        Returns:
            As ``images``.
        """
        b, *_ = _shape(images)
        chosen = torch.rand(b, 1, 1, 1, generator=generator, device=images.device) < self.p
        return torch.where(chosen, images.flip(3), images)


class Normalize:
    """``(x - mean) / std``, per channel. Draws nothing.

    Args:
        mean: One number per channel, or one for all.
        std: Likewise.

    Raises:
        ValueError: If their lengths differ, or a std is not positive.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(mean), tuple(std)
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(
                f"std: expected as many numbers as mean has, at least one, got {len(self.mean)} "
                f"and {len(self.std)}"
            )
        if not all(s > 0 for s in self.std):
            raise ValueError(f"std: expected positive numbers, got {self.std}")
        # Made once: a tensor made of numbers in every call would wait for a GPU.
        self._shift = torch.tensor(self.mean, dtype=torch.float64).view(-1, 1, 1)
        self._scale = torch.tensor(self.std, dtype=torch.float64).view(-1, 1, 1)

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Normalises all images.

        Returns:
            As ``images``.

        Raises:
            ValueError: If the images have another number of channels than mean has.
        """
        channels = _shape(images)[1]
        if len(self.mean) not in (1, channels):
            raise ValueError(
                f"images: expected {len(self.mean)} channels, as mean has, got {channels}"
            )
        if (self._shift.device, self._shift.dtype) != (images.device, images.dtype):
            self._shift, self._scale = self._shift.to(images), self._scale.to(images)
        return (images - self._shift) / self._scale


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, then contrast, then saturation, each times a random factor per image.

    A factor is uniform in ``[max(0, 1 - v), 1 + v]`` for an attribute v. With the grey value
    ``g = 0.299 r + 0.587 g + 0.114 b`` of a pixel (of one channel: itself), contrast scales the
    distance from the image's mean grey value, saturation that from the pixel's own. After each
    step values are cut to [0, 1]. Before `Normalize`, therefore. 0 leaves a step out.

    Attributes:
        brightness: v of brightness.
        contrast: v of contrast.
        saturation: v of saturation; images must have three channels.

    Raises:
        TypeError: If one is no number.
        ValueError: If one is negative.

    Source:
        The steps of torchvision's ColorJitter, in one order, without hue.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            checks.at_least_zero(name, getattr(self, name))

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Changes the colours of every image.

        Returns:
            As ``images``.

        Raises:
            ValueError: If the images have neither one nor three channels, or one, and saturation
                is asked for.
        """
        channels = _shape(images)[1]
        if channels != 3 and (self.saturation or channels != 1):
            wanted = "3 channels" if self.saturation else "1 or 3 channels"
            raise ValueError(f"images: expected {wanted}, got {channels}")
        if self.brightness:
            factor = _factor(images, self.brightness, generator)
            images = (images * factor).clamp_(0, 1)
        if self.contrast:
            factor = _factor(images, self.contrast, generator)
            images = torch.lerp(_grey(images).mean((2, 3), True), images, factor).clamp_(0, 1)
        if self.saturation:
            factor = _factor(images, self.saturation, generator)
            images = torch.lerp(_grey(images), images, factor).clamp_(0, 1)
        return images


def _factor(images: Tensor, spread: float, generator: Generator) -> Tensor:
    low, high = max(0.0, 1.0 - spread), 1.0 + spread
    u = torch.rand(
        len(images), 1, 1, 1, generator=generator, dtype=images.dtype, device=images.device
    )
    return u * (high - low) + low


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    r, g, b = images.unbind(1)
    return (0.299 * r + 0.587 * g + 0.114 * b).unsqueeze(1)


def _shape(images: Tensor) -> tuple[int, int, int, int]:
    """B, C, H, W."""
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images: expected floating [B, C, H, W], got {images.dtype} of shape "
            f"{list(images.shape)}"
        )
    b, c, h, w = images.shape
    return b, c, h, w
