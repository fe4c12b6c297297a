"""What surrounds a run: all or nothing, outside of inference mode, without waiting for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def all_or_nothing(*modules: nn.Module | None) -> Iterator[None]:
    """Put buffers back if an exception comes after some tasks have changed them."""
    buffers = [b for m in modules if m is not None for b in m.buffers()]
    before = [(b, b.detach().clone()) for b in buffers if not b.requires_grad]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for buffer, value in before:  # all: a native batch norm changes no version
                buffer.copy_(value)
        raise


@contextmanager
def normal_mode() -> Iterator[None]:
    """Inner steps need autograd: under inference mode, leave it, and keep no meta-graph."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def sent(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A few numbers, or a tensor, on a device; the host does not wait until they are there."""
    x = numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=dtype, device="cpu")
    return x.to(device, dtype, non_blocking=True)


def first_line(error: BaseException) -> str:
    """What an error says first, or what it is."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
