"""The differentiable ops on Triton's kernels, under its interpreter: a process of its own."""

import os
import subprocess
import sys

import pytest

from fastkfo.kernels import triton

LAYERS = "plain or groups or images_relu or max_pool2d-2 or avg_pool2d-2"
KRON = "test_double_gradient or test_transform_value or test_value_and_gradients"
KRON_CASES = "lrbs or tasks_all or psd_wide or contiguous-square"


@pytest.mark.slow
@pytest.mark.skipif(not triton.available(), reason="needs triton")
@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["test_layers.py"], f"triton-cpu and value_and_derivatives and ({LAYERS})"),
        (["test_kron.py", "test_gram.py"], f"triton and cpu and ({KRON}) and ({KRON_CASES})"),
    ],
    ids=["layers", "kron"],
)
def test_values_and_derivatives(files, chosen):
    """Those of other files; on a GPU the same tests run without the interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *[f"tests/{x}" for x in files], "-k", chosen],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout, done.stdout
