"""`torch.compile` of the vmap peer: minutes to compile, so only on request."""

from __future__ import annotations

import time

import torch

from bench.peers import vmap_peer
from bench.peers.base import InProcess
from bench.problem import Problem


class Compile:
    name = "compile"

    def missing(self) -> str | None:
        return None

    def declines(self, problem: Problem) -> str | None:
        return None

    def prepare(self, problem: Problem) -> InProcess:
        torch.compiler.reset()
        # CUDA graphs where there is CUDA: what its users choose for small kernels.
        mode = "reduce-overhead" if problem.device == "cuda" else "default"
        run = vmap_peer.meta_gradient(problem, torch.compile(mode=mode))
        begin = time.perf_counter()
        run()
        return _Compiled(run, problem.device, compile_s=time.perf_counter() - begin)


class _Compiled(InProcess):
    def launches(self) -> int | None:
        # On the CPU it is one call of generated code; a dispatch mode would switch that off.
        return super().launches() if self._device == "cuda" else None


PEER = Compile()
