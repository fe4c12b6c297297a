"""fastkfo's batched learner: learn2learn's loop over steps, with `clone(tasks=T)`."""

from __future__ import annotations

import fastkfo
from bench.peers.base import InProcess, Whole
from bench.problem import Gradient, Learned, Problem


class Batched(Whole):
    name = "batched"

    def declines(self, problem: Problem) -> str | None:
        return (
            None if problem.features() is None else "the feature extractor is the caller's affair"
        )

    def prepare(self, problem: Problem) -> InProcess:
        learner = problem.learner(fastkfo)
        learned = Learned(None, learner)
        per_task = fastkfo.per_task(problem.loss)
        x_s, y_s, x_q, y_q = problem.data

        def run() -> Gradient:
            learned.clear()
            clone = learner.clone(tasks=problem.tasks)
            for _ in range(problem.steps):
                clone.adapt(per_task(clone(x_s), y_s))
            per_task(clone(x_q), y_q).sum().backward()
            return learned.gradient()

        return InProcess(run, problem.device, release=learned.clear)


PEER = Batched()
