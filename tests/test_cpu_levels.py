"""Every instruction set: the matrix kernel, BLAS where the baseline leaves it products, layers."""

import os
import subprocess
import sys

import pytest

from tests.cases import needs_native

CODE = """
import torch
from fastkfo.functional import gram, kron_update

torch.manual_seed(0)
for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
    for batch, n, m in ((1, 1, 1), (3, 5, 9), (1, 17, 33), (2, 48, 16), (1, 70, 50), (1, 200, 210)):
        p, g = torch.randn(2, batch, n, m, dtype=dtype)
        a, c = torch.randn(n, n, dtype=dtype), torch.randn(m, m, dtype=dtype)
        a.requires_grad_(), c.requires_grad_()
        (u,) = kron_update([p], [g], [a], [c.mT], lr=0.5, psd=True, implementation="native")
        expected = p - 0.5 * (a.mT @ a) @ g @ (c @ c.mT)
        w = torch.randn_like(u)
        ours, theirs = (torch.autograd.grad(y, (a, c), w) for y in (u, expected))
        for x, y in ((u, expected), *zip(ours, theirs)):
            assert (x - y).norm() <= tolerance * y.norm(), (dtype, batch, n, m)

from tests.layer_cases import LAYERS

for case in LAYERS:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        found = []
        for implementation in ("native", "reference"):
            x = case.operands(dtype)
            present = [t for t in x if t is not None]
            y = case.run(x, implementation)
            first = torch.autograd.grad((y / 30).sin().sum(), present, create_graph=True)
            total = sum((g / 30).sin().sum() for g in first)
            second = torch.autograd.grad(total, present)
            found.append((y, *first, *second))
        for ours, theirs in zip(*found):
            assert (ours - theirs).norm() <= tolerance * max(1, theirs.norm()), case
print("agrees")
"""


@needs_native
@pytest.mark.parametrize("level", ["0", "3", "4"])
def test_every_level_agrees(level):
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"FASTKFO_CPU_LEVEL": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "agrees", done.stderr
