"""`fastkfo.InnerLoop`: the whole meta-batch at once, from one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

import fastkfo
from bench import memory
from bench.peers.base import InProcess, Whole
from bench.problem import Gradient, Learned, Problem
from fastkfo.inner_loop import recorder
from fastkfo.inner_loop.graphs import Graph
from fastkfo.inner_loop.recording import Recording, Source

MOST_CALLS = recorder.EAGER_CALLS + 6  # before whatever is recorded again and again is given up


class InnerLoop(Whole):
    """The peer.

    Args:
        name: of the peer.
        memory: InnerLoop's.
        capture: whether calls are recorded where they can be.
    """

    def __init__(
        self, name: str = "inner_loop", memory: str = "full", capture: bool = True
    ) -> None:
        self.name = name
        self._memory, self._capture = memory, capture

    def prepare(self, problem: Problem) -> InProcess:
        features, learner = problem.features(), problem.learner(fastkfo)
        learned = Learned(features, learner)
        recordable = self._memory == "full" and problem.device == recorder.DEVICE
        recorded = self._capture and recordable
        inner_loop = fastkfo.InnerLoop(
            learner,
            problem.loss,
            problem.steps,
            features=features,
            memory=self._memory,
            # The models are known to do the same every time, their Lambdas too.
            capture=True if recorded else "auto" if self._capture else False,
        )

        def run() -> Gradient:
            learned.clear()
            inner_loop(*problem.data).loss.sum().backward()
            return learned.gradient()

        if not recorded:
            return InProcess(run, problem.device, release=learned.clear)
        inner_loop.recorder = counted = Counted(Graph)
        return Recorded(run, problem.device, learned.clear, counted)


class Counted(recorder.Recorder):
    """A recorder that knows how often it has recorded."""

    made = 0

    def record(self, source: Source, data: Sequence[Tensor]) -> Recording:
        self.made += 1
        return super().record(source, data)


class Recorded(InProcess):
    """Calls that are recorded: replayed from the first one that is timed on.

    Args:
        run: computes the gradient.
        device: where.
        release: lets go of what the last call left behind.
        counted: the recorder.

    Raises:
        RuntimeError: They are not replayed, however often they come.
    """

    def __init__(
        self,
        run: Callable[[], Gradient],
        device: str,
        release: Callable[[], None],
        counted: Counted,
    ) -> None:
        super().__init__(run, device, release=release)
        self._counted = counted
        self._recording_bytes: int | None = None
        self._settle()

    def _settle(self) -> None:
        for _ in range(MOST_CALLS):
            before = self._counted.made
            self._release()
            taken = memory.peak_bytes(self._run, self._device)
            if self._counted.made > before:
                self._recording_bytes = taken
            elif before:
                return
        why = self._counted.why_not or "it is recorded anew at every call"
        raise RuntimeError(f"inner_loop: expected replays after {MOST_CALLS} calls: {why}")

    def peak_bytes(self) -> int | None:
        # A replay takes nothing: the graphs have had their memory since they were recorded.
        return self._recording_bytes

    def recordings(self) -> int:
        return self._counted.made


PEER = InnerLoop()
