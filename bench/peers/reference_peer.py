"""The plain PyTorch reference: the shortest formula, one task after the other."""

from __future__ import annotations

from bench.peers.base import InProcess, Whole
from bench.problem import Functional, Gradient, Problem
from fastkfo.reference.loop import meta_gradient


class Reference(Whole):
    name = "reference"

    def prepare(self, problem: Problem) -> InProcess:
        form = Functional(problem)
        return InProcess(lambda: _gradient(problem, form), problem.device)


def _gradient(problem: Problem, form: Functional) -> Gradient:
    mean = meta_gradient(
        form.module,
        *problem.data,
        loss=problem.loss,
        steps=problem.steps,
        lr=form.lr,
        factors=form.phi(form.state),
        psd=problem.psd,
        adapt_transform=problem.adapt_transform,
        features=form.features,
    )
    named = form.gradient(mean.parameters, mean.factors, mean.features)
    return {name: problem.tasks * g for name, g in named.items()}


PEER = Reference()
