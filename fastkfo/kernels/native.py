"""Finds, and if need be compiles, the native libraries, when they are first wanted.

The CPU's: prebuilt, then compiled on first use, then none. CUDA's: prebuilt or none. What happened
is remembered and explained by `fastkfo.backends()`; importing fastkfo loads and compiles nothing.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from fastkfo.kernels import build_flags, fakes

PACKAGE = Path(__file__).resolve().parent.parent


class Status(NamedTuple):
    """How the native library was loaded.

    `source` is "prebuilt", "compiled", "FASTKFO_LIBRARY", or None where there is no library;
    `path` is the file; `error` says why each earlier way failed.
    """

    source: str | None
    path: str | None
    error: str | None


_status: Status | None = None
_cuda_status: Status | None = None
_lock = threading.Lock()


def status() -> Status:
    """Load the library if that was not tried yet, and say how it went."""
    global _status
    if _status is None:
        with _lock:
            if _status is None:
                _status = _load()
    return _status


def available() -> bool:
    """Whether the native library is there."""
    return status().source is not None


def cuda_status() -> Status:
    """The same of the CUDA library, which extends the ops that the CPU library declares."""
    global _cuda_status
    if _cuda_status is None:
        loaded = status()
        with _lock:
            if _cuda_status is None:
                _cuda_status = _load_cuda(loaded)
    return _cuda_status


def _load_cuda(cpu: Status) -> Status:
    if cpu.source is None:
        return Status(None, None, f"the native library could not be loaded ({cpu.error})")
    if torch.version.cuda is None:
        return Status(None, None, "this torch has no CUDA")
    prebuilt = sorted(PACKAGE.glob("_C_cuda*.so")) + sorted(PACKAGE.glob("_C_cuda*.pyd"))
    if not prebuilt:
        return Status(None, None, f"no file _C_cuda*.so in {PACKAGE}: see FASTKFO_BUILD_CUDA")
    library = str(prebuilt[0])
    error = _try_library(library)
    return Status(None if error else "prebuilt", None if error else library, error)


def _load() -> Status:
    named = os.environ.get("FASTKFO_LIBRARY")
    if named:
        error = _try_library(named)
        return Status(None if error else "FASTKFO_LIBRARY", None if error else named, error)
    errors = []
    prebuilt = sorted(PACKAGE.glob("_C.*so")) + sorted(PACKAGE.glob("_C.*pyd"))
    if not prebuilt:
        errors.append(f"prebuilt: no file _C*.so in {PACKAGE}")
    for library in map(str, prebuilt):
        error = _try_library(library)
        if error is None:
            return Status("prebuilt", library, None)
        errors.append(f"prebuilt: {error}")
    try:
        path = _compile()
    except Exception as error:
        errors.append(f"compiled on first use: {_one_line(error)}")
        return Status(None, None, "; ".join(errors))
    return Status("compiled", path, "; ".join(errors))


def _try_library(path: str) -> str | None:
    try:
        torch.ops.load_library(path)
        fakes.register()
    except (OSError, AttributeError, RuntimeError) as error:
        return f"{path}: {_one_line(error)}"
    return None


def _compile() -> str:
    """Compile csrc into torch's extension cache and load it; the path of the library."""
    from torch.utils import cpp_extension

    csrc = build_flags.csrc_folder()
    if not csrc.is_dir():
        raise FileNotFoundError("the folder csrc is neither in the package nor beside it")
    if os.environ.get("FASTKFO_COMPILE") == "0":
        raise RuntimeError("switched off by FASTKFO_COMPILE=0")
    warnings.warn(
        "fastkfo: no prebuilt library; compiling the native kernels once (about a minute)",
        stacklevel=2,
    )
    with _ninja_on_path():
        cpp_extension.load(
            name="fastkfo_C",
            sources=build_flags.sources(csrc),
            extra_include_paths=[str(csrc)],
            extra_cflags=list(build_flags.CXX_FLAGS),
            extra_ldflags=list(build_flags.LINK_FLAGS),
            is_python_module=False,
        )
    return str(Path(cpp_extension._get_build_directory("fastkfo_C", False)) / "fastkfo_C.so")


class _ninja_on_path:
    """The ninja of the running environment, whose bin folder may not be on PATH."""

    def __enter__(self) -> None:
        self.path = os.environ.get("PATH", "")
        if importlib.util.find_spec("ninja") is not None:
            import ninja

            os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, self.path])

    def __exit__(self, *_: object) -> None:
        os.environ["PATH"] = self.path


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wanted = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")
    return f"{type(error).__name__}: {wanted[:300]}"
