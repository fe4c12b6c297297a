"""The CUDA library compiles without a GPU, for every architecture that is shipped, without a spill.

python tests/test_cuda_compiles.py        prints the table of docs/gpu.md
"""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from fastkfo.kernels import build_flags

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
]
NAMES = {"f": "float32", "d": "float64"}


def compiled():
    """What ptxas says: (GPU, kernel, dtype, registers, stack, spilled bytes) per kernel."""
    csrc = build_flags.csrc_folder()
    include = Path(torch.__file__).parent / "include"
    rows = []
    for source in build_flags.cuda_sources(csrc):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                "nvcc", "-c", source, "-o", f"{folder}/object.o", "--threads", "2",
                *build_flags.NVCC_FLAGS, *build_flags.CUDA_ARCHITECTURES, "-Xptxas", "-v",
                f"-I{csrc}", f"-I{include}",
            ]  # fmt: skip
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        rows += read(run.stderr)
    return sorted(rows)


def read(log):
    """Kernels, in what nvcc prints."""
    rows = []
    for block in log.split("Compiling entry function ")[1:]:
        name, architecture = re.match(r"'(\w+)' for '(\w+)'", block).groups()
        kernel, dtype = re.search(r"\d+([a-z_]+)I([fd])", name).groups()
        sizes = re.findall(r"(\d+) bytes (stack frame|spill stores|spill loads)", block)
        stack = sum([int(n) for n, what in sizes if what == "stack frame"])
        spilled = sum([int(n) for n, what in sizes if what != "stack frame"])
        registers = int(re.search(r"Used (\d+) registers", block).group(1))
        rows.append((architecture, kernel, NAMES[dtype], registers, stack, spilled))
    return rows


def test_nothing_spills():
    rows = compiled()
    assert {x[0] for x in rows} == {"sm_80", "sm_90a"}
    assert {x[1] for x in rows} == {"deliver", "pack", "run_tasks", "through_squares"}
    assert [x for x in rows if x[5] > 0] == []


if __name__ == "__main__":
    print("| GPU | kernel | dtype | registers | stack | spilled |\n|---|---|---|---|---|---|")
    for row in compiled():
        print("| " + " | ".join(map(str, row)) + " |")
