"""fastkfo: learn2learn's meta-learning interface on fused kernels.

`import fastkfo as l2l` runs scripts that use learn2learn's `optim`, `nn`, `algorithms`, `utils`,
`data` and `vision`.
"""

from typing import TYPE_CHECKING

from fastkfo import algorithms, functional, nn, optim, utils, vision
from fastkfo._backends import backends
from fastkfo._version import __version__
from fastkfo.inner_loop import BatchedLearner, InnerLoop, explain, per_task
from fastkfo.kernels.selector import ImplementationUnavailable
from fastkfo.utils import (
    accuracy,
    clone_distribution,
    clone_module,
    clone_named_parameters,
    clone_parameters,
    detach_distribution,
    detach_module,
    flatten_config,
    magic_box,
    update_module,
    warn_once,
)

if TYPE_CHECKING:
    from types import ModuleType

    from fastkfo import data

__all__ = [
    "BatchedLearner",
    "ImplementationUnavailable",
    "InnerLoop",
    "__version__",
    "accuracy",
    "algorithms",
    "backends",
    "clone_distribution",
    "clone_module",
    "clone_named_parameters",
    "clone_parameters",
    "data",
    "detach_distribution",
    "detach_module",
    "explain",
    "flatten_config",
    "functional",
    "magic_box",
    "nn",
    "optim",
    "per_task",
    "update_module",
    "utils",
    "vision",
    "warn_once",
]


def __getattr__(name: str) -> "ModuleType":
    # Imported when it is first used.
    if name == "data":
        import importlib

        return importlib.import_module("fastkfo.data")
    raise AttributeError(f"module 'fastkfo' has no attribute {name!r}")
