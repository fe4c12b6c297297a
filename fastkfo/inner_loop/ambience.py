"""What a computation depends on besides its arguments, kept so that it can be repeated exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastkfo.inner_loop.buffers import TaskBuffers


class Ambience:
    """Random states, autocast and changing buffers as they are when this is made.

    Args:
        device: where the computation runs.
        buffers: of the models that run.
    """

    def __init__(self, device: torch.device, buffers: Sequence[TaskBuffers]) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.own: Tensor | None = None
        if device.type == "cuda":
            self.own = torch.cuda.get_rng_state(device)
        kind = device.type
        self.autocast = (
            torch.is_autocast_enabled(kind),
            torch.get_autocast_dtype(kind),
            torch.is_autocast_cache_enabled(),
        )
        # Only a model that runs task after task may change a buffer.
        self.buffers = [b for b in buffers if b.one_by_one and b.others]
        self.snapshots = [b.snapshot() for b in self.buffers]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within this, everything is as it was; afterwards as it was before."""
        devices = [self.device] if self.own is not None else []
        enabled, dtype, cache = self.autocast
        with (
            torch.random.fork_rng(devices, device_type="cuda"),
            torch.autocast(self.device.type, dtype, enabled, cache),
        ):
            torch.set_rng_state(self.cpu)
            if self.own is not None:
                torch.cuda.set_rng_state(self.own, self.device)
            for buffers, snapshot in zip(self.buffers, self.snapshots, strict=True):
                buffers.restore(snapshot)
            yield


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Within this, random draws leave no trace."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, device_type="cuda"):
        yield
