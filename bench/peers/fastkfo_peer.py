"""fastkfo as the drop-in: learn2learn's loop with the import changed and nothing else."""

from __future__ import annotations

import fastkfo
from bench.peers.base import InProcess
from bench.peers.learn2learn_peer import prepared
from bench.problem import Problem


class Fastkfo:
    name = "fastkfo"

    def missing(self) -> str | None:
        return None

    def declines(self, problem: Problem) -> str | None:
        return None

    def prepare(self, problem: Problem) -> InProcess:
        return prepared(problem, fastkfo)


PEER = Fastkfo()
