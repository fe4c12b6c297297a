"""Libraries that differentiate through SGD steps of whole modules: MAML, and no transform."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import nn

import fastkfo
from bench.peers.base import InProcess
from bench.problem import Gradient, Learned, Problem

Loop = Callable[[Problem, nn.Module | None, Any], None]


class MamlOnly:
    """A peer around one library's own loop over tasks.

    Args:
        name: of the peer, and of the package.
        loop: given the problem, the feature extractor and a MAML learner, whose module it adapts.
    """

    def __init__(self, name: str, loop: Loop) -> None:
        self.name = name
        self._loop = loop

    def missing(self) -> str | None:
        return (
            None
            if find_spec(self.name)
            else f"{self.name} is not installed; `pip install {self.name}`"
        )

    def declines(self, problem: Problem) -> str | None:
        return None if problem.method == "maml" else f"{self.name} has no {problem.method}"

    def prepare(self, problem: Problem) -> InProcess:
        features, learner = problem.features(), problem.learner(fastkfo)
        learned = Learned(features, learner)

        def run() -> Gradient:
            learned.clear()
            self._loop(problem, features, learner)
            return learned.gradient()

        return InProcess(run, problem.device, release=learned.clear)
