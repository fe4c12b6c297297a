"""How many calls reach the device: the other half of what a small problem costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def count(run: Callable[[], Any], device: str) -> int:
    """Operations dispatched (CPU) or kernels launched (CUDA) by one call.

    Args:
        run: what is called, once.
        device: "cpu" or "cuda".

    Returns:
        Their number. On CUDA, copies and fills count, and a replayed graph counts as its kernels.
    """
    if device == "cuda":
        return len(kernels(run))
    with _Counter() as counter:
        run()
    return counter.dispatched


class _Counter(TorchDispatchMode):
    """Counts what arrives below autograd and vmap; views, which compute nothing, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.dispatched += not func.is_view
        return func(*args, **(kwargs or {}))


def kernels(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """What one call runs on a GPU: kernels, copies and fills.

    Args:
        run: what is called, once.

    Returns:
        Name and seconds of each, in no order.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    # As they were traced: profile.events() makes a tree of them, which takes minutes for a loop.
    events: Any = profile.profiler.kineto_results.events()
    return [(e.name(), e.duration_ns() / 1e9) for e in events if e.device_type() == on_device]
