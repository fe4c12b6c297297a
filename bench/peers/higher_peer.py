"""higher's functional copies with differentiable SGD, in its documented MAML loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bench.peers.learn2learn_peer import seen
from bench.peers.maml_only import MamlOnly
from bench.problem import Problem


def loop(problem: Problem, features: nn.Module | None, learner: Any) -> None:
    """A copy per task is adapted, whose first parameters are the learner's."""
    import higher

    optimizer = torch.optim.SGD(learner.module.parameters(), lr=problem.lr)
    for x_s, y_s, x_q, y_q in zip(*problem.data, strict=True):
        x_s, x_q = seen(features, x_s, x_q)
        context = higher.innerloop_ctx(learner.module, optimizer, copy_initial_weights=False)
        with context as (copy, step):
            for _ in range(problem.steps):
                step.step(problem.loss(copy(x_s), y_s))
            problem.loss(copy(x_q), y_q).backward()


PEER = MamlOnly("higher", loop)
