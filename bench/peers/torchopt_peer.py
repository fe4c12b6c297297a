"""TorchOpt's differentiable SGD (`torchopt.MetaSGD`) in its documented MAML loop."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import nn

import fastkfo
from bench.peers.base import InProcess
from bench.peers.learn2learn_peer import seen
from bench.problem import Gradient, Problem, gradient_of, named_parameters


class TorchOpt:
    name = "torchopt"

    def missing(self) -> str | None:
        return None if find_spec("torchopt") else "torchopt is not installed"

    def declines(self, problem: Problem) -> str | None:
        return None if problem.method == "maml" else f"TorchOpt has no {problem.method}"

    def prepare(self, problem: Problem) -> InProcess:
        features, learner = problem.features(), problem.learner(fastkfo)
        return InProcess(lambda: _loop(problem, features, learner), problem.device)


def _loop(problem: Problem, features: nn.Module | None, learner: Any) -> Gradient:
    """The module itself is adapted, and put back after each task."""
    import torchopt

    for _, p in named_parameters(features, learner):
        p.grad = None
    model = learner.module
    start = torchopt.extract_state_dict(model, by="reference")
    for x_s, y_s, x_q, y_q in zip(*problem.data, strict=True):
        x_s, x_q = seen(features, x_s, x_q)
        optimizer = torchopt.MetaSGD(model, lr=problem.lr)
        for _ in range(problem.steps):
            optimizer.step(problem.loss(model(x_s), y_s))
        problem.loss(model(x_q), y_q).backward()
        torchopt.recover_state_dict(model, start)
    return gradient_of(features, learner)


PEER = TorchOpt()
