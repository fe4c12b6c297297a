"""Images from files, and as tensors: what torchvision would do, with Pillow alone.

Pillow is imported when the first image is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["pixels", "read_image", "resized", "to_tensor"]

_DEEP = ("I", "F")  # I, I;16, I;16B, …: 16 or 32 bits per pixel; F: floats


def _pillow() -> Any:
    try:
        import PIL.Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading images needs Pillow: pip install --no-build-isolation '.[vision]'",
            name=error.name,
        ) from error
    return PIL.Image


def read_image(path: str | Path, mode: str) -> Any:
    """Read an image file.

    Args:
        path: The file.
        mode: Pillow's name of what comes back: `"L"` grey, `"RGB"` colours.

    Returns:
        A Pillow image.

    Raises:
        ModuleNotFoundError: Without Pillow.
        FileNotFoundError: Without the file.
        ValueError: If it is no image, is cut short or far too large, or has one channel of more
            than 8 bits, which Pillow would cut off at 255.
    """
    image = _pillow()
    try:
        with open(path, "rb") as file:
            opened = image.open(file)
            own = opened.mode
            read = None if own.startswith(_DEEP) else opened.convert(mode)
    except FileNotFoundError:
        raise
    except Exception as error:  # what a broken image raises may be anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: expected a whole image, got {reason}") from error
    if read is None:
        raise ValueError(
            f"{path}: expected an image of 8 bits per channel, got Pillow's mode {own}"
        )
    return read


def pixels(image: Any) -> Tensor:
    """Return the pixels of a Pillow image.

    Args:
        image: With one or several channels C of 8 bits.

    Returns:
        `[C, H, W]`, uint8.

    Raises:
        TypeError: If it is no such image.
    """
    if not hasattr(image, "getbands") or image.mode not in ("L", "RGB", "RGBA"):
        got = getattr(image, "mode", type(image).__name__)
        raise TypeError(f"image: expected a Pillow image of 8 bits per channel, got {got}")
    array = np.array(image)  # [H, W] or [H, W, C]
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1).contiguous()


def to_tensor(image: Any) -> Tensor:
    """Return a Pillow image as numbers from 0 to 1, as torchvision's `ToTensor` does.

    Args:
        image: With one or several channels C of 8 bits.

    Returns:
        `[C, H, W]`, of torch's default dtype.
    """
    return pixels(image).to(torch.get_default_dtype()).div(255)


def resized(image: Any, size: int) -> Any:
    """Make the shorter edge `size` pixels, by Lanczos' filter, as torchvision's `Resize` does.

    Args:
        image: A Pillow image.
        size: Of the shorter edge.

    Returns:
        A Pillow image.
    """
    width, height = image.size
    shorter = min(width, height)
    if shorter == size:
        return image
    shape = (int(size * width / shorter), int(size * height / shorter))
    return image.resize(shape, _pillow().Resampling.LANCZOS)
