"""higher's functional copies with differentiable SGD, in its documented MAML loop."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

import fastkfo
from bench.peers.base import InProcess
from bench.peers.learn2learn_peer import seen
from bench.problem import Gradient, Problem, gradient_of, named_parameters


class Higher:
    name = "higher"

    def missing(self) -> str | None:
        return None if find_spec("higher") else "higher is not installed"

    def declines(self, problem: Problem) -> str | None:
        return None if problem.method == "maml" else f"higher has no {problem.method}"

    def prepare(self, problem: Problem) -> InProcess:
        features, learner = problem.features(), problem.learner(fastkfo)
        return InProcess(lambda: _loop(problem, features, learner), problem.device)


def _loop(problem: Problem, features: nn.Module | None, learner: Any) -> Gradient:
    import higher

    for _, p in named_parameters(features, learner):
        p.grad = None
    optimizer = torch.optim.SGD(learner.module.parameters(), lr=problem.lr)
    for x_s, y_s, x_q, y_q in zip(*problem.data, strict=True):
        x_s, x_q = seen(features, x_s, x_q)
        context = higher.innerloop_ctx(learner.module, optimizer, copy_initial_weights=False)
        with context as (copy, step):
            for _ in range(problem.steps):
                step.step(problem.loss(copy(x_s), y_s))
            problem.loss(copy(x_q), y_q).backward()
    return gradient_of(features, learner)


PEER = Higher()
