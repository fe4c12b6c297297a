"""cross_entropy alone: forward and double backward, against PyTorch's own.

    pytest bench/test_cross_entropy.py --benchmark-only --benchmark-group-by=group

A group is one comparison; its rounds are not interleaved, so read ratios off one quiet run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkfo.functional import cross_entropy

SHAPES = {"5-way, 32 tasks": (32, 25, 5), "20-way, 16 tasks": (16, 20, 20)}  # [T, S, C]
Losses = Callable[[Tensor, Tensor], Tensor]


def flat(logits: Tensor, labels: Tensor) -> Tensor:
    """PyTorch's fastest form: one call for the samples of all tasks."""
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return each.reshape(labels.shape).mean(1)


def batched(logits: Tensor, labels: Tensor) -> Tensor:
    """What a loss of one task is under vmap."""
    return torch.func.vmap(F.cross_entropy)(logits, labels)


LOSSES: dict[str, Losses] = {
    "F.cross_entropy": flat,
    "vmap": batched,
    "cross_entropy": cross_entropy,
}


def to_second_order(loss: Losses, logits: Tensor, labels: Tensor, v: Tensor) -> list[Tensor]:
    """As in an inner step: the loss, its gradient, and the derivative of that gradient along v."""
    losses = loss(logits, labels)
    (grad,) = torch.autograd.grad(losses.sum(), logits, create_graph=True)
    (second,) = torch.autograd.grad(grad, logits, v)
    return [losses, grad, second]


@pytest.fixture(params=SHAPES)
def operands(request, device):
    t, s, c = SHAPES[request.param]
    logits = torch.randn(t, s, c, device=device, requires_grad=True)
    return logits, torch.randint(c, (t, s), device=device), torch.randn(t, s, c, device=device)


@pytest.fixture(params=LOSSES)
def loss(request, operands):
    """An implementation, once it agrees with PyTorch in float64."""
    logits, labels, v = operands
    chosen = LOSSES[request.param]
    exact = to_second_order(flat, logits.detach().double().requires_grad_(), labels, v.double())
    for ours, theirs in zip(to_second_order(chosen, *operands), exact, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    return chosen


def timed(benchmark: Any, device: torch.device, run: Callable[[], Any]) -> None:
    """Many rounds of a call, the device's work included."""

    def once() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=200, warmup_rounds=10)


@pytest.mark.benchmark(group="forward")
def test_forward(benchmark, device, loss, operands):
    logits, labels, _ = operands
    timed(benchmark, device, lambda: loss(logits, labels))


@pytest.mark.benchmark(group="forward and double backward")
def test_forward_and_double_backward(benchmark, device, loss, operands):
    timed(benchmark, device, lambda: to_second_order(loss, *operands))
