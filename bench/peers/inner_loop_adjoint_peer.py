"""`fastkfo.InnerLoop(memory="adjoint")`: memory that hardly grows with the steps, no graphs."""

from __future__ import annotations

from bench.peers.inner_loop_peer import InnerLoop

PEER = InnerLoop("inner_loop_adjoint", memory="adjoint")
