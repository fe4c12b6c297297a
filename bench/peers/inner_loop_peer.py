"""`fastkfo.InnerLoop`: the whole meta-batch at once, from one call."""

from __future__ import annotations

import fastkfo
from bench.peers.base import InProcess, Whole
from bench.problem import Gradient, Learned, Problem
from fastkfo.inner_loop.recorder import EAGER_CALLS


class InnerLoop(Whole):
    name = "inner_loop"

    def prepare(self, problem: Problem) -> InProcess:
        features, learner = problem.features(), problem.learner(fastkfo)
        learned = Learned(features, learner)
        inner_loop = fastkfo.InnerLoop(
            learner,
            problem.loss,
            problem.steps,
            features=features,
            # The models are known to do the same every time, their Lambdas too.
            capture=True if problem.device == "cuda" else "auto",
        )

        def run() -> Gradient:
            learned.clear()
            inner_loop(*problem.data).loss.sum().backward()
            return learned.gradient()

        if problem.device == "cuda":
            for _ in range(EAGER_CALLS + 1):  # recorded before anything is timed
                run()
        return InProcess(run, problem.device, release=learned.clear)


PEER = InnerLoop()
