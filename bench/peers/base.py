"""What a peer is: something that computes a problem's meta-gradient, and can be timed doing so."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from bench import dispatches, memory
from bench.problem import Gradient, Problem


class Prepared(Protocol):
    """A problem made ready by one peer. Compiling is behind it.

    Attributes:
        compile_s: seconds that compiling took; None where nothing is compiled.
    """

    compile_s: float | None

    def gradient(self) -> Gradient:
        """Computes the meta-gradient, on the CPU when it comes back."""

    def seconds(self) -> float:
        """Computes it once; the time that took, the device's own where there is one."""

    def peak_bytes(self) -> int | None:
        """Computes it once; memory at its highest above what was held before."""

    def launches(self) -> int | None:
        """Computes it once; how many dispatches (CPU) or kernel launches (CUDA) that was."""

    def close(self) -> None:
        """Gives back what is held."""


class Peer(Protocol):
    """An implementation, by its name. Each module of this folder has one, named PEER."""

    name: str

    def missing(self) -> str | None:
        """Why it cannot run here at all (not installed), or None."""

    def declines(self, problem: Problem) -> str | None:
        """Why it cannot do this problem, or None."""

    def prepare(self, problem: Problem) -> Prepared:
        """Makes ready, compiles."""


class InProcess:
    """A `Prepared` around a function of PyTorch in this process."""

    def __init__(
        self, run: Callable[[], Gradient], device: str, compile_s: float | None = None
    ) -> None:
        self._run = run
        self._device = device
        self.capturable = run if device == "cuda" else None
        self.compile_s = compile_s

    def gradient(self) -> Gradient:
        return {name: g.detach().cpu().clone() for name, g in self._run().items()}

    def seconds(self) -> float:
        if self._device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self._run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        begin = time.perf_counter()
        self._run()
        return time.perf_counter() - begin

    def peak_bytes(self) -> int | None:
        return memory.peak_bytes(self._run, self._device)

    def launches(self) -> int | None:
        return dispatches.count(self._run, self._device)

    def close(self) -> None:
        self._run = dict
