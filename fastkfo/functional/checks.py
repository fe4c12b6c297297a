"""Checks at the public edge: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real
from operator import index
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def floating_tensor(name: str, x: object, index: int | None = None) -> None:
    """Raise TypeError unless `x` is a tensor of a supported floating-point dtype."""
    if isinstance(x, Tensor) and x.dtype in DTYPES:
        return
    name = name if index is None else f"{name}[{index}]"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    raise TypeError(f"{name}: expected one of {expected}, got {x.dtype}")


def finite(name: str, value: object) -> None:
    """Raise unless `value` is a tensor or a finite number. A tensor's value is not looked at."""
    if isinstance(value, Tensor):
        return floating_tensor(name, value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def positive(name: str, value: object) -> None:
    """Raise unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def same_dtype_and_device(name: str, x: Tensor, other_name: str, other: Tensor, i: int) -> None:
    """Raise unless two operands of item i share dtype and device."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name}[{i}]: expected {other.dtype} as {other_name}[{i}], got {x.dtype}")
    if x.device != other.device:
        raise ValueError(
            f"{name}[{i}]: expected device {other.device} as {other_name}[{i}], got {x.device}"
        )


def operands(**tensors: object) -> None:
    """Raise unless all, but for those that are None, are floating tensors of one dtype and device.

    Args:
        tensors: by name; the first is what the others are compared with.

    Raises:
        TypeError: one is no floating-point tensor, or has another dtype.
        ValueError: one is on another device.
    """
    first: Tensor | None = None
    for name, x in tensors.items():
        if x is None and first is not None:
            continue
        floating_tensor(name, x)
        assert isinstance(x, Tensor)
        if first is None:
            first, of_first = x, name
        if x.dtype != first.dtype:
            raise TypeError(f"{name}: expected {first.dtype} as {of_first}, got {x.dtype}")
        if x.device != first.device:
            raise ValueError(
                f"{name}: expected device {first.device} as {of_first}, got {x.device}"
            )


def norm_operands(x: object, weight: object, bias: object, eps: object) -> None:
    """Raise unless x, weight and bias are operands of a norm, and eps is a number of at least 0.

    Raises:
        TypeError: one is no floating-point tensor, or has another dtype than x (of x in half
            precision, weight and bias may be float32).
        ValueError: one is on another device, or eps is negative or not finite.
    """
    floating_tensor("x", x)
    assert isinstance(x, Tensor)
    low = x.dtype in (torch.bfloat16, torch.float16)
    for name, t in (("weight", weight), ("bias", bias)):
        if isinstance(t, Tensor) and low and t.dtype == torch.float32:
            operands(x=x.float(), **{name: t})
        else:
            operands(x=x, **{name: t})
    finite("eps", eps)
    if eps < 0:  # type: ignore[operator]
        raise ValueError(f"eps: expected at least 0, got {eps}")


def shapes(expected: tuple[int, ...], **tensors: Tensor | None) -> None:
    """Raise ValueError unless tensors, but for those that are None, have a shape."""
    for name, x in tensors.items():
        if x is not None and tuple(x.shape) != expected:
            raise ValueError(f"{name}: expected shape {list(expected)}, got {list(x.shape)}")


def pair(name: str, value: object, least: int) -> tuple[int, int]:
    """Two ints of at least `least`, given as one or as two."""
    both: Sequence[Any] = value if isinstance(value, Sequence) else (value, value)
    if isinstance(both, str) or len(both) not in (1, 2):
        raise TypeError(f"{name}: expected one int or two, got {value!r}")
    for x in both:
        if isinstance(x, bool) or not hasattr(x, "__index__"):  # numpy's have it, too
            raise TypeError(f"{name}: expected ints, got {value!r}")
        if x < least:
            raise ValueError(f"{name}: expected at least {least}, got {value!r}")
    return index(both[0]), index(both[-1])


def operand_list(name: str, value: object, count: int) -> list[Any]:
    """A list of `count` operands; None stands for a list of None."""
    if value is None and count >= 0:
        return [None] * count
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a list of tensors, got {type(value).__name__}")
    if len(value) != count:
        raise ValueError(f"{name}: expected {count} entries, one per gradient, got {len(value)}")
    return list(value)


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for a device; torch has no answer for "meta"."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Where the formula runs: autocast would multiply float32 in lower precision."""
    on = autocast_enabled(device)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def by_dtype_and_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The indices of the tensors, grouped by dtype and device."""
    first = tensors[0]
    if all(x.dtype is first.dtype and x.device == first.device for x in tensors):
        return [list(range(len(tensors)))]
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(tensors):
        groups.setdefault((x.dtype, x.device), []).append(i)
    return list(groups.values())


def scatter(groups: list[list[int]], run: Callable[[list[int]], list[Tensor]]) -> list[Tensor]:
    """Run group by group and put the results back in order."""
    out: dict[int, Tensor] = {}
    for ids in groups:
        out.update(zip(ids, run(ids), strict=True))
    return [out[i] for i in range(len(out))]
