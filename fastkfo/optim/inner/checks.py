"""Checks of an optimizer's numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real

from torch import Tensor


def number(name: str, value: object) -> float:
    """The value; raises unless it is a finite number (and no tensor, which would be learned)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def within(name: str, value: object, least: float, below: float | None = None) -> None:
    """Raise unless a value is a number of at least `least`, and below `below`."""
    given = number(name, value)
    if given < least or (below is not None and given >= below):
        expected = f"at least {least}" if below is None else f"a number in [{least}, {below})"
        raise ValueError(f"{name}: expected {expected}, got {value}")


def refuse_complex(name: str, tensors: Iterable[Tensor | None]) -> None:
    """Raise TypeError if a parameter, or its gradient, is complex: what was asked for is not."""
    for i, x in enumerate(tensors):
        if x is not None and x.is_complex():
            raise TypeError(f"{name}: expected None with parameter {i} in {x.dtype}")
