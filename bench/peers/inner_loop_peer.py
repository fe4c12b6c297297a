"""`fastkfo.InnerLoop`: the whole meta-batch at once, from one call."""

from __future__ import annotations

import fastkfo
from bench.peers.base import InProcess, Whole
from bench.problem import Gradient, Problem, clear_gradients, gradient_of


class InnerLoop(Whole):
    name = "inner_loop"

    def prepare(self, problem: Problem) -> InProcess:
        features, learner = problem.features(), problem.learner(fastkfo)
        inner_loop = fastkfo.InnerLoop(learner, problem.loss, problem.steps, features=features)

        def run() -> Gradient:
            clear_gradients(features, learner)
            inner_loop(*problem.data).loss.sum().backward()
            return gradient_of(features, learner)

        return InProcess(run, problem.device, release=lambda: clear_gradients(features, learner))


PEER = InnerLoop()
