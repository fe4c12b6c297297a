"""TorchOpt's differentiable SGD (`torchopt.MetaSGD`) in its documented MAML loop."""

from __future__ import annotations

from typing import Any

from torch import nn

from bench.peers.learn2learn_peer import seen
from bench.peers.maml_only import MamlOnly
from bench.problem import Problem


def loop(problem: Problem, features: nn.Module | None, learner: Any) -> None:
    """The module itself is adapted, and put back after each task."""
    import torchopt

    model = learner.module
    start = torchopt.extract_state_dict(model, by="reference")
    for x_s, y_s, x_q, y_q in zip(*problem.data, strict=True):
        x_s, x_q = seen(features, x_s, x_q)
        optimizer = torchopt.MetaSGD(model, lr=problem.lr)
        for _ in range(problem.steps):
            optimizer.step(problem.loss(model(x_s), y_s))
        problem.loss(model(x_q), y_q).backward()
        torchopt.recover_state_dict(model, start)


PEER = MamlOnly("torchopt", loop)
