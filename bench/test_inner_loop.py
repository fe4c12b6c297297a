"""functional.inner_loop alone: a meta-gradient by the kernels, and by the formula in PyTorch.

    pytest bench/test_inner_loop.py --benchmark-only --benchmark-group-by=group

A group is one comparison; its rounds are not interleaved, so read ratios off one quiet run.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkfo.functional import Layer, inner_loop

# Widths, samples of support and query, tasks.
SIZES = {
    "head 64-5, 16 tasks": ((64, 5), 25, 16),
    "mlp 1-40-40-1, 32 tasks": ((1, 40, 40, 1), 10, 32),
    "mlp 784-64-5, 32 tasks": ((784, 64, 5), 5, 32),
    "smallest": ((1, 1), 1, 1),
}


def call(widths: tuple[int, ...], samples: int, tasks: int) -> Callable[[str], Tensor]:
    """Five steps with Kronecker factors, forwards and backwards."""
    layers: list[Layer] = []
    shapes: list[tuple[int, ...]] = []
    for k, (m, n) in enumerate(pairwise(widths)):
        layers += [Layer("relu", m, m)] if k else []
        layers.append(Layer("linear", m, n, len(shapes), len(shapes) + 1))
        shapes += [(n, m), (n,)]
    theta = [torch.randn(s, requires_grad=True) for s in shapes]
    left = [torch.eye(s[0], requires_grad=True) for s in shapes]
    right = [torch.eye(s[1] if len(s) == 2 else 1, requires_grad=True) for s in shapes]
    x = torch.randn(2, tasks, samples, widths[0])
    y = torch.randn(2, tasks, samples, widths[-1])

    def run(implementation: str) -> Tensor:
        out = inner_loop(
            layers, theta, x[0], y[0], x[1], y[1],
            steps=5, lr=0.01, left=left, right=right, psd=True, loss="mse",
            implementation=implementation,
        )  # fmt: skip
        assert out.loss is not None
        out.loss.mean().backward()
        return out.loss

    return run


@pytest.mark.parametrize("implementation", ["reference", "native"])
@pytest.mark.parametrize("size", SIZES)
def test_meta_gradient(benchmark: Any, size: str, implementation: str) -> None:
    benchmark.group = size
    run = call(*SIZES[size])
    torch.testing.assert_close(run(implementation), run("reference"), rtol=1e-4, atol=1e-5)
    benchmark(run, implementation)
