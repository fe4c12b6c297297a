"""Nothing in an inner loop waits for the GPU: tests/fake_gpu.py, on a GPU that is not there.

tests/test_inner_loop_gpu.py asks CUDA itself.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkfo.kernels import triton as ops
from tests.cases import needs_native
from tests.fake_gpu import WAITS

HERE = Path(__file__).parent

pytestmark = [
    needs_native,
    pytest.mark.skipif(not ops.available(), reason="needs triton"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch knows real GPUs"),
    pytest.mark.skipif(torch.__version__ < "2.13", reason="no_device_guard.cpp is for 2.13"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ on Linux"),
]


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """What every case ended with: None, or an error."""
    library = tmp_path_factory.mktemp("fake_gpu") / "library.so"
    folder = Path(torch.__file__).parent
    command = [
        "g++", "-shared", "-fPIC", "-O0", "-w", "-std=c++20", f"-I{folder / 'include'}",
        str(HERE / "no_device_guard.cpp"), "-o", str(library), f"-L{folder / 'lib'}", "-lc10",
        "-ltorch_cpu", f"-Wl,-rpath,{folder / 'lib'}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CC": "g++"}
    command = [sys.executable, str(HERE / "fake_gpu.py"), str(library)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    return {row["case"]: row["error"] for row in rows}


def test_no_case_waits(errors):
    assert {k: x for k, x in errors.items() if x is not None and k not in WAITS} == {}
    assert len(errors) > 45


def test_who_waits_is_seen(errors):
    found = [errors[k].split(":")[0] for k in WAITS]
    assert found == ["DataDependentOutputException", "Waits", "DataDependentOutputException"]
