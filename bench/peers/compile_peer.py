"""`torch.compile` of the vmap peer: minutes to compile, so only on request."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._inductor.utils import fresh_cache

from bench import clock
from bench.peers import vmap_peer
from bench.peers.base import InProcess, Whole
from bench.problem import Gradient, Problem

# On CUDA the first compiles, the second records a graph, and the third replays it.
WARM_CALLS = {"cpu": 1, "cuda": 3}


class Compile(Whole):
    name = "compile"

    def prepare(self, problem: Problem) -> InProcess:
        torch.compiler.reset()
        # CUDA graphs where there is CUDA: what its users choose for small kernels.
        mode = "reduce-overhead" if problem.device == "cuda" else "default"
        run = vmap_peer.meta_gradient(problem, torch.compile(mode=mode))
        with fresh_cache():  # what an earlier process compiled would be found on disk
            warm = [clock.seconds(run, problem.device) for _ in range(WARM_CALLS[problem.device])]
        usual = clock.seconds(run, problem.device)
        return _Compiled(run, problem.device, compile_s=sum(warm) - len(warm) * usual)


class _Compiled(InProcess):
    def __init__(self, run: Callable[[], Gradient], device: str, compile_s: float) -> None:
        super().__init__(run, device, compile_s)
        self.capturable = None  # it replays graphs of its own

    def peak_bytes(self) -> int | None:
        # On CUDA its graphs' pool was taken before, so that nothing would be seen to grow.
        return None if self._device == "cuda" else super().peak_bytes()

    def launches(self) -> int | None:
        # On the CPU it is one call of generated code; a dispatch mode would switch that off.
        return super().launches() if self._device == "cuda" else None


PEER = Compile()
