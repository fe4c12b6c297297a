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
VARIANTS = {
    "PassE0": "forward", "PassE1": "backward", "PassE2": "double backward", "MultiplyE1": "tf32",
}  # fmt: skip
KERNELS = {
    "add_parts", "deliver", "grams", "kron_units", "pack", "run_tasks", "through_squares",
}  # fmt: skip


def compiled():
    """What ptxas says: (GPU, kernel, dtype, registers, stack, spilled bytes) per kernel.

    Two processes at a time: nvcc's own threads take turns.
    """
    cubins = [x for x in build_flags.CUDA_ARCHITECTURES if ",code=sm_" in x]  # and no PTX
    first, *others = cubins
    rows = []
    for source in build_flags.cuda_sources(build_flags.csrc_folder()):
        with tempfile.TemporaryDirectory() as folder:
            logs = [Path(folder, name) for name in ("first.log", "others.log")]
            runs = [start(source, *x) for x in zip(logs, ([first], others), strict=True)]
            for run, log in zip(runs, logs, strict=True):
                assert run.wait() == 0, log.read_text()[-3000:]
                rows += read(log.read_text())
    return sorted(rows)


def start(source, log, architectures):
    csrc, include = build_flags.csrc_folder(), Path(torch.__file__).parent / "include"
    command = [
        "nvcc", "-c", source, "-o", str(log.with_suffix(".o")), *build_flags.NVCC_FLAGS,
        *architectures, "-Xptxas", "-v", f"-I{csrc}", f"-I{include}",
    ]  # fmt: skip
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file)


def read(log):
    """Kernels, in what nvcc prints."""
    rows = []
    for block in log.split("Compiling entry function ")[1:]:
        name, architecture = re.match(r"'(\w+)' for '(\w+)'", block).groups()
        kernel, dtype, rest = re.search(r"\d+([a-z_]+)I([fd])(.*)", name).groups()
        found = [VARIANTS[x] for x in re.findall(r"(MultiplyE1|PassE\d)", rest)]
        kernel = ", ".join([kernel, *reversed(found)])
        sizes = re.findall(r"(\d+) bytes (stack frame|spill stores|spill loads)", block)
        stack = sum([int(n) for n, what in sizes if what == "stack frame"])
        spilled = sum([int(n) for n, what in sizes if what != "stack frame"])
        registers = int(re.search(r"Used (\d+) registers", block).group(1))
        rows.append((architecture, kernel, NAMES[dtype], registers, stack, spilled))
    return rows


def test_nothing_spills_or_has_a_stack():
    rows = compiled()
    assert {x[0] for x in rows} == {"sm_80", "sm_90a"}
    assert {x[1].split(",")[0] for x in rows} == KERNELS
    assert len({x[1] for x in rows}) == 4 + 1 + 2 + 6
    assert [x for x in rows if x[4] > 0 or x[5] > 0] == []


if __name__ == "__main__":
    print("| GPU | kernel | dtype | registers | stack | spilled |\n|---|---|---|---|---|---|")
    for row in compiled():
        print("| " + " | ".join(map(str, row)) + " |")
