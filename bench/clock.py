"""One call's seconds, and who else was at work meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def seconds(run: Callable[[], Any], device: str) -> float:
    """What one call takes: by events on CUDA, from the first kernel to the last."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


class Elsewhere:
    """How many cores were busy with other work, from its making to `cores()`.

    Other work slows down whoever uses every core, in every round alike: quartiles do not show it.

    Args:
        workers: processes whose work is ours too.
    """

    def __init__(self, workers: Sequence[int] = ()) -> None:
        self._workers = workers
        self._begin = self._read()

    def cores(self) -> float | None:
        """Their number, on average; None where the system does not tell (not Linux)."""
        end = self._read()
        if self._begin is None or end is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self._begin, end, strict=True))
        return max(0.0, (busy - own) / max(wall, 1e-3))

    def _read(self) -> tuple[float, float, float] | None:
        """Seconds: of the clock, busy on all cores, and ours."""
        try:
            total = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
            own = sum(os.times()[:2]) + sum(map(_cpu_seconds, self._workers))
        except (OSError, ValueError):
            return None
        user, nice, system, _, _, irq, softirq, stolen = (int(n) for n in total)
        ticks = user + nice + system + irq + softirq + stolen
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), own


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
