"""The native libraries, and csrc/ as package data. Everything else is in pyproject.toml.

``FASTKFO_BUILD_NATIVE=0`` leaves them out: fastkfo then compiles the CPU's on first use.
``FASTKFO_BUILD_CUDA=1`` builds the CUDA library or fails, ``0`` leaves it out; unset, it is built
where torch is a CUDA build and its toolkit is there. No GPU is looked for.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

os.chdir(Path(__file__).resolve().parent)
CSRC = Path("csrc")  # relative: setuptools refuses absolute source paths

NO_TORCH = """
fastkfo compiles its native library against the torch it will run on, and this build finds no torch.
Install torch first, then build without isolation:

    pip install torch numpy ninja "setuptools>=77"
    pip install --no-build-isolation .

(With FASTKFO_BUILD_NATIVE=0 nothing is compiled now, but on first use.)
"""


def native_library():
    """What builds fastkfo/_C.abi3.so, which torch.ops.load_library loads: it is no Python module.

    Returns:
        Arguments for setup().

    Raises:
        SystemExit: if there is no torch to build against.
    """
    # The ninja of a virtual environment that is not activated is beside its python.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ModuleNotFoundError as error:
        raise SystemExit(f"{NO_TORCH}\n({error})") from error

    class Incremental(BuildExtension):
        """One folder for every kind of build, and ninja, not setuptools, judges what is stale."""

        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(Path("build/native").resolve())
            self.force = True

    flags = runpy.run_path("fastkfo/kernels/build_flags.py")
    extension = CppExtension(
        "fastkfo._C",
        sources=flags["sources"](CSRC),
        depends=flags["headers"](CSRC),
        include_dirs=[str(CSRC.resolve())],
        py_limited_api=True,
        extra_compile_args={"cxx": flags["CXX_FLAGS"]},
        extra_link_args=flags["LINK_FLAGS"],
    )
    return {
        "ext_modules": [extension, *cuda_library(flags)],
        "cmdclass": {"build_ext": Incremental},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def toolkit_version(folder):
    """The major version of the CUDA toolkit in a folder.

    Args:
        folder: CUDA_HOME, or None.

    Returns:
        The version, or None where there is no nvcc that says one.
    """
    nvcc = Path(folder or "") / "bin" / "nvcc"
    if folder is None or not nvcc.exists():
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.", said)
    return found.group(1) if found else None


def cuda_library(flags):
    """What builds fastkfo/_C_cuda.abi3.so, which only a CUDA build of torch can load.

    Args:
        flags: what build_flags.py defines.

    Returns:
        One extension, or none.

    Raises:
        SystemExit: if it was asked for and cannot be built.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    wanted = os.environ.get("FASTKFO_BUILD_CUDA")
    possible = torch.version.cuda is not None and toolkit_version(CUDA_HOME) is not None
    if possible and wanted != "1":  # another major version does not build
        possible = torch.version.cuda.split(".")[0] == toolkit_version(CUDA_HOME)
    if wanted == "0" or (wanted != "1" and not possible):
        return []
    if not possible:
        raise SystemExit(
            "FASTKFO_BUILD_CUDA=1: expected a CUDA build of torch and its toolkit, got "
            f"torch {torch.__version__} and CUDA_HOME={CUDA_HOME}"
        )
    own = [] if "TORCH_CUDA_ARCH_LIST" in os.environ else flags["CUDA_ARCHITECTURES"]
    return [
        CUDAExtension(
            "fastkfo._C_cuda",
            sources=flags["cuda_sources"](CSRC),
            depends=flags["headers"](CSRC),
            include_dirs=[str(CSRC.resolve())],
            py_limited_api=True,
            extra_compile_args={"cxx": flags["CXX_FLAGS"], "nvcc": [*flags["NVCC_FLAGS"], *own]},
        )
    ]


setup(
    packages=[*find_packages(include=["fastkfo", "fastkfo.*"]), "fastkfo.csrc"],
    package_dir={"fastkfo.csrc": "csrc"},
    package_data={
        "fastkfo": ["py.typed"],
        "fastkfo.csrc": ["**/*.h", "**/*.cpp", "**/*.cuh", "**/*.cu"],
    },
    **({} if os.environ.get("FASTKFO_BUILD_NATIVE") == "0" else native_library()),
)
