"""Every Triton kernel compiles without a GPU, for Ampere, Hopper and AMD's gfx942; none spills.

In a process of its own (triton_compile.py): this one may have Triton in its interpreter.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastkfo.kernels import triton as ops

HERE = Path(__file__).parent
DTYPES = ("float32", "tf32", "bfloat16", "float64")
TARGETS = {"80": DTYPES, "90": DTYPES, "gfx942": ("float32", "bfloat16", "float64")}
# Of what a block may have, 163 KiB on Ampere and more on Hopper, half: two blocks fit. AMD: all.
SHARED = {"80": 163 * 1024 // 2, "90": 163 * 1024 // 2, "gfx942": 64 * 1024}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ops.available(), reason="needs triton"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What came out: a dict per kernel, dtype and target; two processes at a time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    )

    def compile_for(target):
        command = [sys.executable, HERE / "triton_compile.py", target, ",".join(TARGETS[target])]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    with ThreadPoolExecutor(2) as two:
        runs = list(two.map(compile_for, TARGETS))
    for run in runs:
        assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for run in runs for line in run.stdout.splitlines()]


def test_every_kernel_compiles(compiled):
    sources = Path(ops.__file__).parent.glob("*_kernels.py")
    kernels = {x for path in sources for x in re.findall(r"def (\w+_kernel)\(", path.read_text())}
    assert len(kernels) == 19
    for target, dtypes in TARGETS.items():
        for dtype in dtypes:
            rows = [x for x in compiled if (x["target"], x["dtype"]) == (target, dtype)]
            # TF32 is a matter of products; the other kernels are float32's, compiled already.
            wanted = {x for x in kernels if dtype != "tf32" or x.startswith(("conv", "gram"))}
            assert {x["kernel"] for x in rows} == wanted
            assert min(x["size"] for x in rows) > 0


def test_precision(compiled):
    """AMD's matrix cores have float32; NVIDIA's take it apart, unless TF32 is allowed."""
    found = {(x["target"], x["dtype"], x["precision"]) for x in compiled if x["precision"]}
    float32 = {"80": "tf32x3", "90": "tf32x3", "gfx942": "ieee"}
    assert {x for x in found if x[1] == "float32"} == {
        (k, "float32", v) for k, v in float32.items()
    }
    assert {x[2] for x in found if x[1] == "tf32"} == {"tf32"}
    assert {x[2] for x in found if x[1] == "float64"} == {"ieee"}


def test_nothing_spills(compiled):
    found = {
        (x["kernel"], x["dtype"], x["target"], x["constants"])
        for x in compiled
        if x["local"] or x["spilled"]
    }
    assert found == set()


def test_shared_memory_suffices(compiled):
    assert [x for x in compiled if x["shared"] > SHARED[x["target"]]] == []
