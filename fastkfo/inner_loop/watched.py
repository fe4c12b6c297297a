"""Whether anything changed that the behaviour of modules depends on."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any

from torch import nn

from fastkfo.optim.recognise import global_hooks


class Watched:
    """Modules as they are when this is made.

    They are compared object by object: every attribute of every module, what its dictionaries and
    lists hold, and of every parameter what assigning to `.data` can change.

    Args:
        modules: the modules, their children among them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._classes = [(m, type(m)) for m in modules]
        self._states = [(m.__dict__, list(m.__dict__.values())) for m in modules]
        values = [v for _, state in self._states for v in state]
        self._empty = [v for v in values if isinstance(v, (dict, list, set)) and not v]
        self._full: list[tuple[Any, list[Any]]] = [
            (v.values(), list(v.values())) for v in values if isinstance(v, dict) and v
        ]
        self._full += [(v, list(v)) for v in values if isinstance(v, list) and v]
        params = {p: None for m in modules for p in m._parameters.values() if p is not None}
        self._params = [(p, p.dtype, p.device, p.shape, p.requires_grad) for p in params]

    def unchanged(self) -> bool:
        """Whether they still are as they were."""
        if any(self._empty) or global_hooks():
            return False
        for module, kind in self._classes:
            if type(module) is not kind:
                return False
        for state, values in self._states:
            if len(state) != len(values) or not all(map(is_, state.values(), values)):
                return False
        for now, before in self._full:
            if len(now) != len(before) or not all(map(is_, now, before)):
                return False
        for p, dtype, device, shape, wants in self._params:
            if p.dtype is not dtype or p.requires_grad is not wants:
                return False
            if p.shape != shape or p.device != device:
                return False
        return True
