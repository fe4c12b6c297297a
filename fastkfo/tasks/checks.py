"""Checks of the options that task distributions share."""

from __future__ import annotations

import math

import torch

# What torch.Generator.manual_seed takes; negative seeds would be others in disguise.
_SEEDS = 2**63


def integer(name: str, value: object) -> None:
    """Raises unless a value is an int (and no bool).

    Raises:
        TypeError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")


def count(name: str, value: int) -> None:
    """Raises unless a value is an int of at least 1.

    Raises:
        TypeError: It is no int.
        ValueError: It is less than 1.
    """
    integer(name, value)
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def seed(name: str, value: int) -> None:
    """Raises unless a value seeds a generator.

    Raises:
        TypeError: It is no int.
        ValueError: It is negative, or 2**63 or more.
    """
    integer(name, value)
    if not 0 <= value < _SEEDS:
        raise ValueError(f"{name}: expected 0 to 2**63 - 1, got {value}")


def device(name: str, value: torch.device | str | None) -> torch.device:
    """The device, or the CPU.

    Returns:
        A device that tensors can be put on here.

    Raises:
        TypeError: It is no device and no name of one.
        ValueError: There is no such device, or PyTorch does not see it.
    """
    if value is None:
        return torch.device("cpu")
    try:
        found = torch.device(value)
        torch.empty(0, device=found)
    except TypeError:
        raise TypeError(f"{name}: expected a device, got {type(value).__name__}") from None
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{name}: expected a device that PyTorch sees, got {str(value)!r} ({reason})"
        ) from None
    return found


def flag(name: str, value: object) -> None:
    """Raises unless a value is a bool.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def at_least_zero(name: str, value: float) -> None:
    """Raises unless a value is a finite number that is not negative.

    Raises:
        TypeError: It is no number.
        ValueError: It is negative or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")


def interval(name: str, value: tuple[float, float]) -> None:
    """Raises unless a value is two finite numbers, the lower first.

    Raises:
        TypeError: It is no pair of numbers.
        ValueError: They are not finite, or in the wrong order.
    """
    numbers = isinstance(value, tuple | list) and len(value) == 2
    if not (numbers and all(isinstance(v, int | float) for v in value)):
        raise TypeError(f"{name}: expected two numbers (low, high), got {value!r}")
    low, high = value
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{name}: expected finite numbers with low <= high, got {value}")


def floating(name: str, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype, or torch's default one.

    Returns:
        A floating dtype.

    Raises:
        TypeError: It is none.
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{name}: expected a floating torch.dtype, got {dtype!r}")
    return dtype
