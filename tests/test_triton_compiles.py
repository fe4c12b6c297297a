"""Every Triton kernel compiles without a GPU, for Ampere and Hopper, and no register spills.

In a process of its own (triton_compile.py): this one may have Triton in its interpreter.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastkfo.kernels import triton as ops

HERE = Path(__file__).parent
CAPABILITIES, DTYPES = (80, 90), ("float32", "tf32", "bfloat16", "float64")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ops.available(), reason="needs triton"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What came out: a dict per kernel, dtype and compute capability, each in a process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    )
    command = [sys.executable, str(HERE / "triton_compile.py")]
    runs = [
        subprocess.Popen(
            [*command, str(capability), ",".join(DTYPES)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for capability in CAPABILITIES
    ]  # fmt: skip
    rows = []
    for run in runs:
        said, errors = run.communicate()
        assert run.returncode == 0, errors[-3000:]
        rows += [json.loads(line) for line in said.splitlines()]
    return rows


def test_every_kernel_compiles(compiled):
    sources = Path(ops.__file__).parent.glob("*_kernels.py")
    kernels = {x for path in sources for x in re.findall(r"def (\w+_kernel)\(", path.read_text())}
    assert len(kernels) == 14
    for capability in CAPABILITIES:
        for dtype in DTYPES:
            rows = [x for x in compiled if (x["capability"], x["dtype"]) == (capability, dtype)]
            # TF32 is a matter of the convolutions; the others are float32's, compiled already.
            wanted = {x for x in kernels if dtype != "tf32" or x.startswith("conv")}
            assert {x["kernel"] for x in rows} == wanted
            assert min(x["cubin"] for x in rows) > 0


def test_nothing_spills(compiled):
    found = {(x["kernel"], x["dtype"], x["capability"]) for x in compiled if x["local"] > 0}
    assert found == set()


def test_shared_memory_suffices(compiled):
    """Of what a block may have, 163 KiB on Ampere and more on Hopper, half: two blocks fit."""
    assert [x for x in compiled if x["shared"] > 163 * 1024 // 2] == []
