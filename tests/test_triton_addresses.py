"""Triton's kernels address more than 2^31 elements, and what they cannot is refused.

Nobody has the memory: tests/triton_addresses.py runs the kernels' own arithmetic and says where
they would read and write. `test_more_elements_than_32_bits_count` reads and writes there, on a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkfo.kernels import triton as ops

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ops.available(), reason="needs triton"),
]


@pytest.fixture(scope="module")
def rows():
    """What was read and written: a dict per case, kernel and operand."""
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(HERE / "triton_addresses.py")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_no_address_is_outside_of_its_operand(rows):
    assert [x for x in rows if x["outside"] is not None] == []


def test_every_kernel_goes_beyond_32_bits(rows):
    reached = {x["kernel"] for x in rows for k in ("read", "write") if x[k] and x[k][1] >= 2**31}
    assert reached == {x["kernel"] for x in rows}
    assert len(reached) == 14


def test_results_are_written_from_end_to_end(rows):
    """To their last tile: of the loops over tiles not all are run."""
    written = [x for x in rows if x["write"] is not None]
    assert [x for x in written if x["write"][0] != 0] == []
    assert [x for x in written if x["write"][1] + 1 < 0.95 * x["elements"]] == []
    large = [x["operand"] for x in written if x["elements"] > 2**31]
    assert {"y", "dx", "d_dy", "out", "where"} <= set(large)


def meta(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


MOST = 2**31 - 2**16
WINDOW = ((1, 1), (0, 0), (1, 1), 1)
REFUSED = {
    "tasks": (lambda: ops.batch_norm(meta(65536, 2, 1), None, None, 1e-5, False), 65536),
    "groups or blocks of channels": (
        lambda: ops.conv2d(meta(1, 1, 1, 1, 65536), meta(1, 65536, 1, 1, 1), None, None, None,
                           *WINDOW[:3], 65536),
        65536,
    ),
    "pixels of a task": (
        lambda: ops.max_pool2d(meta(1, MOST + 1, 1, 1, 1), [1, 1], [1, 1], [0, 0], [1, 1], [1, 1]),
        MOST + 1,
    ),
    "elements of an image": (
        lambda: ops.conv2d(meta(1, 1, 1, 1, MOST + 1), meta(1, 1, MOST + 1, 1, 1), None, None, None,
                           *WINDOW),
        MOST + 1,
    ),
    "weights of a task's group": (
        lambda: ops.conv2d_weight(meta(1, 1, 1, 1, 2**16), meta(1, 1, 1, 1, 2**15), (1, 1), *WINDOW,
                                  False),
        2**31,
    ),
    "tiles of a task": (
        lambda: ops.conv2d_input(meta(1, 2**20, 1, 1, 1), meta(1, 1, 1, 1, 1), (1, 1), (999, 999),
                                 *WINDOW[1:]),
        "[0-9]+",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_too_large_is_refused(name):
    call, size = REFUSED[name]
    with pytest.raises(ValueError, match=f"^{name}: expected at most .*, got {size}$"):
        call()


@pytest.mark.parametrize("block", [16, 32, 64, 128, 1024, 2048])
@pytest.mark.parametrize("parallel", [1, 2, 7, 100, 511, 512, 10**6])
def test_chunks_of_a_long_sum_are_counted_in_32_bits(parallel, block):
    """The kernels count to the end of the last chunk that a power of two of them would have."""
    from fastkfo.kernels.triton import launch

    for length in (1, 1000, 2**30 - 1, 2**30, 2**30 + 1, MOST - 1, MOST):
        each, chunks = launch.steps(length, parallel, block)
        padded = 1 << (chunks - 1).bit_length()
        assert each * block * (chunks - 1) < length <= each * block * chunks
        assert each * block * padded <= 2**31
