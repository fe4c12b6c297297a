"""Memory that a fused inner loop keeps for its derivative, used again.

A tape is written anew in every meta-step. Taken from the system each time, its pages cost as much
as the steps of a small model.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEPT = 2  # the last meta-step's graph is usually alive until the next one is there
LARGEST = 1 << 26  # bytes; what is larger goes back to the system

_free: dict[torch.dtype, list[Tensor]] = {}


class Tape:
    """Uninitialised memory that comes back when nobody holds this object any more.

    Args:
        rows: T, the number of tasks.
        size: numbers per task.
        like: tells dtype and device.

    Attributes:
        tensor: `[T, size]`.
    """

    __slots__ = ("_memory", "tensor")

    def __init__(self, rows: int, size: int, like: Tensor) -> None:
        count = rows * size
        memory = None
        if like.device.type == "cpu" and type(like) is Tensor:
            memory = _taken(like.dtype, count)
        if memory is None:
            memory = like.new_empty(count)
        self._memory = memory
        self.tensor = memory[:count].view(rows, size)

    def __del__(self) -> None:
        """Keep the memory, if it is worth it."""
        memory = getattr(self, "_memory", None)
        if memory is None or type(memory) is not Tensor or memory.device.type != "cpu":
            return
        free = _free.setdefault(memory.dtype, [])
        if len(free) < KEPT and memory.numel() * memory.element_size() <= LARGEST:
            free.append(memory)


def _taken(dtype: torch.dtype, count: int) -> Tensor | None:
    free = _free.get(dtype)
    if not free:
        return None
    try:
        memory = free.pop()
    except IndexError:  # another thread was faster
        return None
    # Neither too small nor so large that most of it would lie idle.
    return memory if count <= memory.numel() <= 4 * count + 4096 else None
