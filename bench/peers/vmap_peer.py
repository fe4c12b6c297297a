"""`torch.func.vmap` over tasks of a loop of `torch.func.grad`, as PyTorch's tutorials do it.

Wrong wherever a batch norm's own weight and bias are adapted: `vmap(grad(f))`, differentiated once
more, loses a term there. The gate shows by how much.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vjp, vmap

from bench.peers.base import InProcess, Whole
from bench.problem import Functional, Gradient, Problem
from fastkfo.reference.loop import call
from fastkfo.reference.transforms import Phi, flatten, like, update

State = dict[str, Tensor]


class Vmap(Whole):
    name = "vmap"

    def prepare(self, problem: Problem) -> InProcess:
        run = meta_gradient(problem)
        return InProcess(run, problem.device)


def meta_gradient(problem: Problem, compiler: Any = lambda f: f) -> Callable[[], Gradient]:
    """The gradient of the sum of all tasks' query losses, as a function of nothing.

    Args:
        problem: what is computed.
        compiler: wraps the function of state and tasks, `torch.compile` for example.
    """
    form = Functional(problem)
    task_loss = query_loss(problem, form)
    state = {name: t.detach() for name, t in form.state.items()}

    def total(state: State, *tasks: Tensor) -> Tensor:
        return vmap(task_loss, in_dims=(None, 0, 0, 0, 0))(state, *tasks).sum()

    gradient = compiler(grad(total))
    return lambda: gradient(state, *problem.data)


def query_loss(problem: Problem, form: Functional) -> Callable[..., Tensor]:
    """The loss of one task after K inner steps, in `torch.func`'s terms."""
    module, features = without_statistics(form.module), without_statistics(form.features)

    def loss(theta: State, x: Tensor, y: Tensor) -> Tensor:
        return problem.loss(call(module, theta, x), y)

    def task(state: State, x_s: Tensor, y_s: Tensor, x_q: Tensor, y_q: Tensor) -> Tensor:
        if features is not None:
            seen = call(features, form.psi(state), torch.cat([x_s, x_q]))
            x_s, x_q = seen.split([len(x_s), len(x_q)])
        theta, phi = form.theta(state), form.phi(state)
        last: State | None = None
        for _ in range(problem.steps):
            g = grad(loss)(theta, x_s, y_s)
            if problem.adapt_transform and last is not None:
                phi = {n: _adapted(p, last[n], g[n], form.lr) for n, p in phi.items()}
            theta = {n: theta[n] - form.lr * _update(g[n], phi.get(n)) for n in theta}
            last = g
        return loss(theta, x_q, y_q)

    return task


def without_statistics(module: nn.Module | None) -> Any:
    """A copy whose batch norms keep no running statistics: vmap cannot write to them in place."""
    return None if module is None else torch.func.replace_all_batch_norm_modules_(deepcopy(module))


def _update(gradient: Tensor, phi: Phi | None) -> Tensor:
    return gradient if phi is None else update(gradient, phi)


def _adapted(phi: Phi, last: Tensor, gradient: Tensor, lr: float) -> Phi:
    """φ + lr² (∂U_φ(last gradient)/∂φ)ᵀ gradient."""
    inputs = flatten([phi])
    _, pull = vjp(lambda *tensors: update(last, like(phi, iter(tensors))), *inputs)
    return like(phi, iter([f + lr**2 * d for f, d in zip(inputs, pull(gradient), strict=True)]))


PEER = Vmap()
