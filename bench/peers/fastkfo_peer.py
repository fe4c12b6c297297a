"""fastkfo as the drop-in: learn2learn's loop with the import changed and nothing else."""

from __future__ import annotations

import fastkfo
from bench.peers.base import InProcess, Whole
from bench.peers.learn2learn_peer import prepared
from bench.problem import Problem


class Fastkfo(Whole):
    name = "fastkfo"

    def prepare(self, problem: Problem) -> InProcess:
        return prepared(problem, fastkfo)


PEER = Fastkfo()
