"""The differentiable ops on Triton's kernels, under its interpreter: a process of its own."""

import os
import subprocess
import sys

import pytest

from fastkfo.kernels import triton

CASES = "plain or groups or images_relu or max_pool2d-2 or avg_pool2d-2"


@pytest.mark.slow
@pytest.mark.skipif(not triton.available(), reason="needs triton")
def test_values_and_derivatives():
    """Those of tests/test_layers.py; on a GPU the same tests run without the interpreter."""
    chosen = f"triton-cpu and value_and_derivatives and ({CASES})"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_layers.py", "-k", chosen],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout, done.stdout
