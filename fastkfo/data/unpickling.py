"""Reading pickles of others: plain containers, strings, numbers and numeric arrays, nothing else.

A pickle can name any function and have it called. Here it can name nothing that runs: the few names
that numpy's arrays and `collections.defaultdict` need stand for builders of this module, and any
other name is an error before anything of it is imported.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

__all__ = ["UnsafePickleError", "load_plain"]


class UnsafePickleError(pickle.UnpicklingError, ValueError):
    """A pickle that names something other than plain data."""


class _Builder:
    """A callable that a pickle can call, but neither look into nor change."""

    __slots__ = ()


class _Text(_Builder):
    """`_codecs.encode`, by which protocol 2 writes bytes."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise UnsafePickleError(f"bytes encoded as {encoding!r}")
        return text.encode("latin1")


class _DType:
    """A numeric dtype in the making: its name, then its byte order."""

    __slots__ = ("value",)

    def __init__(self, name: str, align: Any = False, copy: Any = True) -> None:
        self.value = np.dtype(name if isinstance(name, str) else "O")
        if self.value.kind not in "biuf":
            raise UnsafePickleError(f"arrays of dtype {name!r}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class _Array:
    """An array in the making."""

    __slots__ = ("value",)

    def __init__(self, *ignored: Any) -> None:
        self.value: np.ndarray[Any, Any] | None = None

    def fill(self, raw: Any, dtype: _DType, shape: tuple[int, ...], order: str) -> _Array:
        raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2's bytes
        if not isinstance(raw, (bytes, bytearray)):
            raise UnsafePickleError(f"an array made of {type(raw).__name__}")
        # A copy, since bytes cannot be written to.
        self.value = np.frombuffer(raw, dtype.value).reshape(shape, order=order).copy(order)  # type: ignore[call-overload]
        return self

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.fill(raw, dtype, shape, "F" if fortran else "C")


class _New(_Builder):
    __slots__ = ("make",)
    make: Callable[..., Any]

    def __init__(self, make: Callable[..., Any]) -> None:
        object.__setattr__(self, "make", make)

    def __setattr__(self, name: str, value: Any) -> None:
        raise UnsafePickleError(f"an assignment to {name!r}")

    def __call__(self, *arguments: Any) -> Any:
        return self.make(*arguments)


def _scalar(dtype: _DType, raw: bytes) -> Any:
    return np.frombuffer(raw, dtype.value)[0].item()


def _defaultdict(factory: Any = None) -> dict[Any, Any]:
    return {}


def _from_buffer(raw: Any, dtype: _DType, shape: tuple[int, ...], order: str) -> _Array:
    return _Array().fill(raw, dtype, shape, order)


def _no_bytes() -> bytes:
    return b""


def _never(*arguments: Any) -> Any:
    raise UnsafePickleError("a call of a type")


_NAMES: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _Text(),
    ("collections", "defaultdict"): _New(_defaultdict),
    ("numpy", "dtype"): _New(_DType),
    ("numpy", "ndarray"): _New(_never),
}
for _module in ("builtins", "__builtin__"):  # the latter in Python 2
    _NAMES[_module, "set"] = _New(set)
    _NAMES[_module, "bytes"] = _New(_no_bytes)
    # Arguments of the others, never called.
    for _name in ("list", "int", "long"):
        _NAMES[_module, _name] = _New(_never)
for _module in ("numpy.core", "numpy._core"):
    _NAMES[f"{_module}.multiarray", "_reconstruct"] = _New(_Array)
    _NAMES[f"{_module}.multiarray", "scalar"] = _New(_scalar)
    _NAMES[f"{_module}.numeric", "_frombuffer"] = _New(_from_buffer)


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _NAMES.get((module, name))
        if found is None:
            raise UnsafePickleError(f"the name {module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError("persistent objects")


def load_plain(path: str | Path) -> Any:
    """Read a pickle of plain data; nothing that it names is imported or run.

    Plain are None, booleans, numbers, strings, bytes, lists, tuples, sets, dictionaries (a
    `defaultdict` becomes a `dict`), and numpy's arrays of booleans, integers or floats.

    Args:
        path: The file, of any protocol.

    Returns:
        What it holds.

    Raises:
        UnsafePickleError: If it names anything else. It is a `pickle.UnpicklingError` and a
            `ValueError`; the message has the file and the name.
        ValueError: If the file is no pickle, or is cut short.
        OSError: If it cannot be read.

    Example:
        >>> load_plain("mini-imagenet-cache-test.pkl")["image_data"].shape
        (12000, 84, 84, 3)
    """
    try:
        with open(path, "rb") as file:
            return _finished(_read(file))
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path}: refused, expected plain data, got {error}") from None
    except OSError:
        raise
    except Exception as error:  # what a broken pickle raises may be anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: expected a whole pickle file, got {reason}") from error


def _read(file: IO[bytes]) -> Any:
    try:
        return _Plain(file).load()
    except UnicodeDecodeError:  # Python 2 wrote bytes as strings
        file.seek(0)
        return _Plain(file, encoding="latin1").load()


def _finished(value: Any) -> Any:
    """Arrays for what stands for them, in lists, tuples and dictionaries."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        # Large dictionaries and lists of numbers are kept as they are.
        if any([_unfinished(v) for v in value.values()]):
            return {k: _finished(v) for k, v in value.items()}
    elif isinstance(value, (list, tuple)) and any([_unfinished(v) for v in value]):
        return type(value)([_finished(v) for v in value])
    return value


def _unfinished(value: Any) -> bool:
    return isinstance(value, (_Array, dict, list, tuple))
