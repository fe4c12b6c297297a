"""Fused inner loops of more than 2^31 numbers: the arithmetic of places, and what is refused."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.functional.inner_loop_spec import FORMS
from fastkfo.kernels import build_flags
from tests.cases import needs_native

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_places_are_counted_in_64_bits(tmp_path):
    program = tmp_path / "large_plans"
    subprocess.run(
        [
            COMPILER, "-std=c++17", "-O1", "-fsanitize=signed-integer-overflow",
            "-fsanitize-undefined-trap-on-error", f"-I{build_flags.csrc_folder()}",
            str(HERE / "large_plans.cpp"), "-o", str(program),
        ],
        check=True,
    )  # fmt: skip
    run = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "576 plans\n")


def virtual(*shape, dtype=torch.float32):
    """Memory that nobody touches, and that is therefore not there."""
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError:
        pytest.skip("the system promises no more memory than it has")


def tape(x_s, width, steps=1, left=None):
    """The numbers per task that a linear head keeps for its derivative."""
    y_s = virtual(*x_s.shape[:2], dtype=torch.int64)
    theta = [virtual(width, x_s.shape[2])]
    call = torch.ops.fastkfo.inner_loop_tape.default
    layers = [0, x_s.shape[2], width, 0, -1]
    return call(
        theta, [left] if left is not None else [], [], [], [], x_s, y_s, None, None, layers, [0.0],
        [0.1], steps, 0, 0, FORMS["factored"], left is not None, False,
    )  # fmt: skip


@needs_native
def test_the_tape_of_a_task_of_more_than_32_bits():
    """It grows with the samples as it does where all is small."""
    width, features, samples = 5, 2**16, 2**15 + 64
    small = [tape(virtual(1, s, features), width) for s in (64, 128, 192)]
    assert small[2] - small[1] == small[1] - small[0]
    assert tape(virtual(1, samples, features), width) == small[0] + (small[1] - small[0]) * (
        samples // 64 - 1
    )


TOO_LARGE = {
    "tasks": (lambda: tape(virtual(2**31, 1, 1), 1), r"fewer than 2\^31 tasks, got 2147483648"),
    "samples": (lambda: tape(virtual(1, 2**24, 1), 1), r"fewer than 2\^24 samples of a task"),
    "features": (lambda: tape(virtual(1, 1, 2**24), 1), r"fewer than 2\^24 features of a layer"),
    "outputs": (lambda: tape(virtual(1, 1, 1), 2**24), r"fewer than 2\^24 features of a layer"),
    "factor": (
        lambda: tape(virtual(1, 1, 1), 1, left=virtual(2**24, 1)),
        r"fewer than 2\^24 rows of a factor",
    ),
    "steps": (lambda: tape(virtual(1, 1, 1), 1, steps=2**20), "bad number of steps"),
    "all": (
        lambda: tape(virtual(1, 2**23, 1), 2**23, steps=2**19),
        "64 bits do not count the numbers of a task",
    ),
}


@needs_native
@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_is_too_large_is_refused(name):
    call, message = TOO_LARGE[name]
    with pytest.raises(RuntimeError, match=message):
        call()


@needs_native
def test_an_inner_loop_that_is_too_large_for_the_kernels_is_batched():
    torch.manual_seed(0)
    model = fastkfo.algorithms.MAML(nn.Linear(1, 2), lr=0.1)
    x, y = torch.randn(1, 2**24, 1), torch.zeros(1, 2**24, dtype=torch.int64)
    loop = fastkfo.InnerLoop(model, F.cross_entropy, 1)
    with torch.no_grad():
        found = loop(x, y, x[:, :3], y[:, :3]).loss
    batched = fastkfo.InnerLoop(model, F.cross_entropy, 1, backend="batched")
    with torch.no_grad():
        assert torch.equal(found, batched(x, y, x[:, :3], y[:, :3]).loss)
    fused = fastkfo.InnerLoop(model, F.cross_entropy, 1, backend="fused")
    with torch.no_grad(), pytest.raises(ValueError, match=r"fewer than 2\^24 samples of a task"):
        fused(x, y, x[:, :3], y[:, :3])
