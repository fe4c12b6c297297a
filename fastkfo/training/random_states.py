"""All global random states at once: what a training begins with, leaves behind, and keeps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["capture", "own", "restore", "seeded"]


def capture(device: torch.device) -> dict[str, Any]:
    """The states of PyTorch (CPU, and the device if it is a GPU), Python and numpy.

    Args:
        device: Where the training runs.

    Returns:
        Tensors and plain values, which ``torch.load(..., weights_only=True)`` reads.
    """
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (the global state is what it is about)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Sets what `capture` returned.

    Args:
        state: See there.
        device: Where the training runs.
    """
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002


def seeded(seed: int, device: torch.device) -> dict[str, Any]:
    """The states that a seed gives; the global ones are left alone.

    Args:
        seed: The seed.
        device: Where the training runs.

    Returns:
        As `capture`.
    """
    outer = capture(device)
    try:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        return capture(device)
    finally:
        restore(outer, device)


@contextmanager
def own(state: dict[str, Any], device: torch.device) -> Iterator[None]:
    """Runs a block on states of its own; afterwards the caller's are as they were.

    Args:
        state: What the block begins with.
        device: Where the training runs.

    Yields:
        Nothing.
    """
    outer = capture(device)
    try:
        restore(state, device)
        yield
    finally:
        restore(outer, device)
