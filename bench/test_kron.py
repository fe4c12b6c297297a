"""kron_update alone: against the per-parameter PyTorch formula, and against plain BLAS.

    pytest bench/test_kron.py --benchmark-only --benchmark-group-by=group

A group is one comparison; its rounds are not interleaved, so read ratios off one quiet run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.problem import Functional, Problem
from fastkfo.functional import kron_update

LR = 0.1
Operands = list[list[Tensor]]


def four_blocks(device: torch.device) -> Operands:
    """θ, G, L, R of every parameter of `omniglot-cnn`, as matrices."""
    problem = Problem.named("omniglot-cnn", "kfo", device=device.type)
    form = Functional(problem)
    theta, phi = form.theta(form.state), form.phi(form.state)
    left, right = ([getattr(phi[name], side) for name in theta] for side in ("left", "right"))
    views = [
        p if p.dim() == 2 else p.reshape(-1, len(a), len(c))
        for p, a, c in zip(theta.values(), left, right, strict=True)
    ]
    return [
        [t.detach().clone() for t in group]
        for group in (views, [torch.randn_like(v) for v in views], left, right)
    ]


def formula(*operands: list[Tensor]) -> list[Tensor]:
    """What learn2learn computes: one parameter at a time, psd factors."""
    return [p - LR * ((a.T @ a) @ g @ (c.T @ c)) for p, g, a, c in zip(*operands, strict=True)]


def fused(*operands: list[Tensor]) -> list[Tensor]:
    return kron_update(*operands, lr=LR, psd=True)


UPDATES = {"formula": formula, "kron_update": fused}


def timed(benchmark: Any, device: torch.device, run: Callable[[], Any]) -> None:
    """Many rounds of a call, the device's work included."""

    def once() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=100, warmup_rounds=5)


@pytest.fixture
def operands(device):
    return four_blocks(device)


@pytest.fixture(params=UPDATES)
def update(request, operands):
    """An implementation, once it agrees with the formula in float64."""
    exact = formula(*[[t.double() for t in group] for group in operands])
    chosen = UPDATES[request.param]
    for ours, theirs in zip(chosen(*operands), exact, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    return chosen


@pytest.mark.benchmark(group="4-block CNN, forward")
def test_forward(benchmark, device, update, operands):
    timed(benchmark, device, lambda: update(*operands))


@pytest.mark.benchmark(group="4-block CNN, forward and backward")
def test_forward_backward(benchmark, device, update, operands):
    learnable = [[t.requires_grad_() for t in group] for group in operands]
    timed(benchmark, device, lambda: torch.autograd.backward([u.sum() for u in update(*learnable)]))


@pytest.mark.benchmark(group="1024 x 1024 factors")
@pytest.mark.parametrize("implementation", ["BLAS", "kron_update"])
def test_large_factors(benchmark, device, implementation):
    theta, g, left, right = torch.randn(4, 1024, 1024, device=device).unbind()
    runs = {
        "BLAS": lambda: torch.addmm(theta, left @ g, right, alpha=-LR),
        "kron_update": lambda: kron_update([theta], [g], [left], [right], lr=LR)[0],
    }
    error = (runs["BLAS"]() - runs["kron_update"]()).norm() / runs["BLAS"]().norm()
    assert error < 1e-5
    timed(benchmark, device, runs[implementation])
