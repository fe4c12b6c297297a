"""The ops of csrc/cuda, compiled for the CPU: tests/cuda_on_cpu has the emulation of a block."""

import subprocess
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from fastkfo.kernels import build_flags

HERE = Path(__file__).resolve().parent / "cuda_on_cpu"


@contextmanager
def emulated(source: str, namespace: str, names: Sequence[str], folder: Path):
    """`torch.ops.<namespace>` with ops of fastkfo, built from a file of tests/cuda_on_cpu."""
    library = folder / "library.so"
    torch_folder = Path(torch.__file__).parent
    flags = [x for x in build_flags.CXX_FLAGS if "openmp" not in x and x != "-O3"]
    subprocess.run(
        [
            "g++", "-shared", "-fPIC", "-O1", *flags,
            *(f"-I{x}" for x in (HERE, build_flags.csrc_folder(), torch_folder / "include")),
            str(HERE / source), "-o", str(library),
            f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10",
        ],
        check=True,
    )  # fmt: skip
    ours = torch.library.Library(namespace, "DEF")
    for name in names:
        schema = getattr(torch.ops.fastkfo, name).default._schema
        ours.define(str(schema).replace("fastkfo::", ""))
    torch.ops.load_library(str(library))
    yield getattr(torch.ops, namespace)
    del ours
