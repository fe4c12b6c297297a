"""InnerLoop under DistributedDataParallel: two processes, one meta-gradient."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastkfo
from tests.batches import batch, learner
from tests.distributed_script import STEPS, TASKS
from tests.models import assert_close

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "full": ({}, {}),
    "adjoint-adapt": ({"memory": "adjoint"}, {"adapt_transform": True}),
    "chunks": ({"chunk_size": 2}, {}),
}


@pytest.fixture(scope="module")
def two_processes():
    """What two processes find for every case: they are started once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.distributed_script", json.dumps(CASES)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("found ")]
    return json.loads(line.removeprefix("found "))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(two_processes, name):
    found, (path, options) = two_processes[name], CASES[name]
    assert found["agree"]
    assert found["reductions"] == 1

    ours = learner("cnn", "kron-psd", **options)
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, STEPS, **path)
    loop(*batch("cnn", TASKS)).loss.mean().backward()
    total = sum(p.grad.square().sum() for p in loop.parameters()).sqrt().item()
    for p, values in zip(loop.parameters(), found["grads"], strict=True):
        got = torch.tensor(values, dtype=torch.float64).reshape(p.shape)
        assert_close(got, p.grad, floor=1e-4 * total)
