"""Cloning, updating and detaching modules inside a differentiable graph; small helpers.

Source: the interface is learn2learn 0.2.0's `utils` (https://github.com/learnables/learn2learn).
"""

from fastkfo.utils.cloning import (
    check_not_compiled,
    clone_module,
    clone_named_parameters,
    clone_parameters,
)
from fastkfo.utils.distributions import clone_distribution, detach_distribution
from fastkfo.utils.misc import accuracy, flatten_config, magic_box, warn_once
from fastkfo.utils.updating import (
    ParameterSlots,
    detach_module,
    replace_parameters,
    update_module,
)

__all__ = [
    "ParameterSlots",
    "accuracy",
    "check_not_compiled",
    "clone_distribution",
    "clone_module",
    "clone_named_parameters",
    "clone_parameters",
    "detach_distribution",
    "detach_module",
    "flatten_config",
    "magic_box",
    "replace_parameters",
    "update_module",
    "warn_once",
]
