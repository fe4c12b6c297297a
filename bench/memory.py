"""Peak memory of a call, above what was held before it."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int | None:
    """Call once and see how high memory goes.

    Args:
        run: what is called.
        device: "cuda" reads the allocator's peak, "cpu" the growth of the resident set.

    Returns:
        Bytes, good to about a MiB on the CPU; None where the system does not tell (not Linux).
    """
    gc.collect()
    return _cuda(run) if device == "cuda" else resident_growth(run)


def give_back(device: str) -> None:
    """Memory that nothing uses any more goes back to the device, graphs' too."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def resident_growth(run: Callable[[], Any]) -> int | None:
    """How far the resident set grows during a call; imports nothing but the standard library."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there to be reused unseen
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from now
        before = _status("VmRSS")
    except (OSError, AttributeError):
        return None
    run()
    return max(0, _status("VmHWM") - before)


def available() -> int:
    """Bytes that could still be taken on this machine."""
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    return 1024 * int(found[1]) if found else 0


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"no {field} in /proc/self/status")
    return 1024 * int(found[1])


def _cuda(run: Callable[[], Any]) -> int:
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
