"""Means with intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

__all__ = ["Interval", "interval"]


class Interval(NamedTuple):
    """A mean, and half the width of its 95 % interval.

    Attributes:
        mean: The mean.
        half: ``1.96 s / √n``, with s² the unbiased variance.
    """

    mean: float
    half: float


def interval(values: Tensor) -> Interval:
    """The mean of n values with its 95 % interval, ``mean ± 1.96 s / √n``.

    Args:
        values: ``[n]``; n = 1 gives a NaN for the half width.

    Returns:
        Both, computed in float64.

    Example:
        >>> interval(torch.tensor([0.0, 1.0]))
        Interval(mean=0.5, half=0.9799999999999999)
    """
    values = values.double()
    if len(values) < 2:
        return Interval(values.mean().item(), math.nan)
    half = 1.96 * values.std().item() / math.sqrt(len(values))
    return Interval(values.mean().item(), half)
