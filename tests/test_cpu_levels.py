"""The matrix kernel of every instruction set, and BLAS where the baseline leaves products to it."""

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
