"""Loads the real learn2learn 0.2.0 as the oracle of the tests and of the benchmarks.

Its package does not install on Python 3.11 or newer (stale generated C), but `utils`, `optim`,
`nn` and `algorithms` are pure Python: they are imported from an unpacked source distribution.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

_VERSION = "0.2.0"
_LIGHTNING = (
    "LightningEpisodicModule",
    "LightningMAML",
    "LightningANIL",
    "LightningPrototypicalNetworks",
    "LightningMetaOptNet",
)


def _package_folder() -> Path:
    """Find the folder that is the package `learn2learn` itself."""
    default = Path(__file__).resolve().parent.parent / ".cache" / f"learn2learn-{_VERSION}"
    root = Path(os.environ.get("LEARN2LEARN_SRC") or default)
    for folder in (root / "learn2learn", root):
        if (folder / "utils" / "__init__.py").is_file() and (folder / "_version.py").is_file():
            return folder
    message = (
        f"learn2learn {_VERSION}, the oracle, is not in {root}. Get it with\n"
        "  pip download --no-deps --no-binary :all: --no-build-isolation "
        f"learn2learn=={_VERSION}\n"
        f"unpack it to {default} (or point LEARN2LEARN_SRC at it), "
        "or set FASTKFO_NO_ORACLE=1 to skip the tests that need it."
    )
    raise FileNotFoundError(message)


def learn2learn() -> Any:
    """Return what `load` returns; without its source, skip the test if FASTKFO_NO_ORACLE=1."""
    try:
        return load()
    except FileNotFoundError as error:
        if os.environ.get("FASTKFO_NO_ORACLE") != "1":
            raise
        import pytest

        pytest.skip(str(error), allow_module_level=True)


@functools.cache
def load() -> Any:
    """Return the module `learn2learn` with `utils`, `optim`, `nn` and `algorithms`.

    Raises:
        FileNotFoundError: If its source is not there; the message says how to get it.
        RuntimeError: If the source found is of another version.
    """
    folder = _package_folder()
    package = types.ModuleType("learn2learn")
    package.__path__ = [str(folder)]
    # PyTorch Lightning is not wanted: a stand-in holds the names that `algorithms` imports.
    lightning = types.ModuleType("learn2learn.algorithms.lightning")
    for name in _LIGHTNING:
        setattr(lightning, name, None)
    stand_ins = {package.__name__: package, lightning.__name__: lightning}
    before = dict(sys.modules)
    sys.modules.update(stand_ins)
    try:
        version = importlib.import_module("learn2learn._version").__version__
        if version != _VERSION:
            raise RuntimeError(f"expected learn2learn {_VERSION} in {folder}, got {version}")
        for part in ("utils", "optim", "nn", "algorithms"):
            setattr(package, part, importlib.import_module(f"learn2learn.{part}"))
            if part == "utils":  # `optim` and `algorithms` read these from the top level
                names = vars(package.utils).items()
                vars(package).update({k: v for k, v in names if not k.startswith("_")})
    except BaseException:
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] == "learn2learn":
                del sys.modules[name]
        raise
    return package


@functools.cache
def vision_models() -> Any:
    """Return the module `learn2learn.vision.models`; no download works in it.

    `learn2learn.vision` and `learn2learn.data` would import torchvision and compiled code.
    """
    package = learn2learn()
    vision = types.ModuleType("learn2learn.vision")
    vision.__path__ = [f"{package.__path__[0]}/vision"]
    download = types.ModuleType("learn2learn.data.utils")
    download.download_file = None  # type: ignore[attr-defined]
    stand_ins = [vision, types.ModuleType("learn2learn.data"), download]
    sys.modules.update({module.__name__: module for module in stand_ins})
    return importlib.import_module("learn2learn.vision.models")
