"""learn2learn 0.2.0's own loop, as its examples write it: the oracle, and what ratios are to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.peers.base import InProcess
from bench.problem import Gradient, Learned, Problem


def loop(problem: Problem, features: nn.Module | None, learner: Any) -> None:
    """One task after the other; the gradients of the sum of the query losses."""
    for x_s, y_s, x_q, y_q in zip(*problem.data, strict=True):
        x_s, x_q = seen(features, x_s, x_q)
        clone = learner.clone()
        for _ in range(problem.steps):
            clone.adapt(problem.loss(clone(x_s), y_s))
        problem.loss(clone(x_q), y_q).backward()


def seen(features: nn.Module | None, x_s: Tensor, x_q: Tensor) -> tuple[Tensor, Tensor]:
    """One task's features, of support and query together, as the KFO scripts take them."""
    if features is None:
        return x_s, x_q
    support, query = features(torch.cat([x_s, x_q])).split([len(x_s), len(x_q)])
    return support, query


def prepared(problem: Problem, l2l: Any) -> InProcess:
    """The loop on one library."""
    return around(problem, problem.features(), problem.learner(l2l))


def around(problem: Problem, features: nn.Module | None, learner: Any) -> InProcess:
    """The loop around a learner."""
    learned = Learned(features, learner)

    def run() -> Gradient:
        learned.clear()
        loop(problem, features, learner)
        return learned.gradient()

    return InProcess(run, problem.device, release=learned.clear)


class Learn2learn:
    name = "learn2learn"

    def missing(self) -> str | None:
        try:
            self._library()
        except (FileNotFoundError, RuntimeError) as error:
            return str(error).partition(" Get it")[0] + " `make bench` fetches it."
        return None

    def declines(self, problem: Problem) -> str | None:
        return None

    def prepare(self, problem: Problem) -> InProcess:
        return prepared(problem, self._library())

    @staticmethod
    def _library() -> Any:
        from tests.oracle import load

        return load()


PEER = Learn2learn()
