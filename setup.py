"""The native library, and csrc/ as package data. Everything else is in pyproject.toml.

``FASTKFO_BUILD_NATIVE=0`` leaves the library out: fastkfo then compiles it on first use.
"""

import os
import runpy
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
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Incremental},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=[*find_packages(include=["fastkfo", "fastkfo.*"]), "fastkfo.csrc"],
    package_dir={"fastkfo.csrc": "csrc"},
    package_data={
        "fastkfo": ["py.typed"],
        "fastkfo.csrc": ["**/*.h", "**/*.cpp", "**/*.cuh", "**/*.cu"],
    },
    **({} if os.environ.get("FASTKFO_BUILD_NATIVE") == "0" else native_library()),
)
