"""How the native libraries are compiled: shared by setup.py and by the compile on first use.

Standard library only, and no import from the package: setup.py loads this file by its path, at a
time when neither fastkfo nor torch can be assumed to be importable.
"""

import sys
from pathlib import Path

# The oldest torch whose stable ABI the library may use (2.10), and the oldest Python (3.10).
TORCH_TARGET_VERSION = "0x020a000000000000"
PY_LIMITED_API = "0x030A0000"  # spelled as torch spells it: no redefinition warning

# Apple's clang has no -fopenmp; the threads are torch's (parallel_for) in any case.
_OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else []

CXX_FLAGS = [
    "-O3",
    "-g0",  # some distributions' Pythons ask for -g, which makes the library ten times as large
    "-std=c++17",
    "-fvisibility=hidden",
    "-Wno-psabi",  # no vector crosses a call
    *_OPENMP,
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    f"-DPy_LIMITED_API={PY_LIMITED_API}",
]
LINK_FLAGS = [*_OPENMP]

# The GPUs that the CUDA library has code for: Ampere and Hopper, and PTX for what comes after them.
# TORCH_CUDA_ARCH_LIST, where it is set, takes the place of these.
CUDA_ARCHITECTURES = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
]
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-DUSE_CUDA",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    f"-DPy_LIMITED_API={PY_LIMITED_API}",
]


def csrc_folder() -> Path:
    """Where the C++ sources are.

    Returns:
        ``fastkfo/csrc`` of an installed wheel, else ``csrc`` beside ``fastkfo`` in a checkout. The
        folder need not exist.
    """
    package = Path(__file__).resolve().parent.parent
    packaged = package / "csrc"
    return packaged if packaged.is_dir() else package.parent / "csrc"


def sources(csrc: Path) -> list[str]:
    """The translation units of the CPU library, in a stable order.

    Args:
        csrc: the folder with ``library.cpp`` and ``cpu/``; relative stays relative.

    Returns:
        ``library.cpp``, then every ``cpu/*.cpp``.
    """
    return [str(csrc / "library.cpp"), *sorted(str(path) for path in csrc.glob("cpu/*.cpp"))]


def headers(csrc: Path) -> list[str]:
    """Every header below ``csrc``: a change in one rebuilds the library.

    Args:
        csrc: the folder with ``library.cpp`` and ``cpu/``; relative stays relative.

    Returns:
        The paths, sorted.
    """
    return sorted(str(path) for path in csrc.rglob("*.*h"))


def cuda_sources(csrc: Path) -> list[str]:
    """The translation units of the CUDA library, in a stable order.

    Args:
        csrc: the folder with ``cuda/``; relative stays relative.

    Returns:
        Every ``cuda/*.cu``.
    """
    return sorted(str(path) for path in csrc.glob("cuda/*.cu"))
