"""What a peer is: something that computes a problem's meta-gradient, and can be timed doing so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from bench import clock, dispatches, memory
from bench.problem import Gradient, Problem


class Prepared(Protocol):
    """A problem made ready by one peer. Compiling is behind it.

    Attributes:
        compile_s: seconds that compiling took; None where nothing is compiled.
        pid: of the process that works, if it is another one.
        capturable: what a CUDA graph may record, or None.
    """

    compile_s: float | None
    pid: int | None
    capturable: Callable[[], Gradient] | None

    def gradient(self) -> Gradient:
        """Computes the meta-gradient, on the CPU when it comes back."""

    def seconds(self) -> float:
        """Computes it once; the time that took, the device's own where there is one."""

    def peak_bytes(self) -> int | None:
        """Computes it once; memory at its highest above what was held before."""

    def launches(self) -> int | None:
        """Computes it once; how many dispatches (CPU) or kernel launches (CUDA) that was."""

    def recordings(self) -> int:
        """How many calls were recorded (as a CUDA graph) so far, instead of only run."""

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


class Whole:
    """Of a peer that is part of PyTorch or of this repository, and can do every problem."""

    def missing(self) -> str | None:
        return None

    def declines(self, problem: Problem) -> str | None:
        return None


class InProcess:
    """A `Prepared` around a function of PyTorch in this process.

    Args:
        run: computes the gradient.
        device: "cpu" or "cuda".
        compile_s: seconds that compiling took.
        release: lets go of what the last call left behind, `.grad` for example.
    """

    def __init__(
        self,
        run: Callable[[], Gradient],
        device: str,
        compile_s: float | None = None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self._run = run
        self._release = release
        self._device = device
        self.pid: int | None = None
        self.capturable = run if device == "cuda" else None
        self.compile_s = compile_s

    def gradient(self) -> Gradient:
        return {name: g.detach().cpu().clone() for name, g in self._run().items()}

    def seconds(self) -> float:
        return clock.seconds(self._run, self._device)

    def peak_bytes(self) -> int | None:
        self._release()  # else what a peer still holds would be missing from its growth
        return memory.peak_bytes(self._run, self._device)

    def launches(self) -> int | None:
        return dispatches.count(self._run, self._device)

    def recordings(self) -> int:
        return 0

    def close(self) -> None:
        self._release()
        self._run, self.capturable = dict, None
