"""What a learner was read as, remembered until something changes."""

from __future__ import annotations

from operator import is_
from typing import Any

from torch import nn

from fastkfo.inner_loop.fused import Fused, read_loss
from fastkfo.optim.recognise import global_hooks


class Remembered:
    """A `Fused` of a learner, for as long as nothing changes that it depends on.

    Reading a learner takes longer than all steps of a small one. So what it was read from is
    compared, object by object: every attribute of every module, what its dictionaries and lists
    hold, and of every parameter what assigning to `.data` can change.
    """

    def __init__(self) -> None:
        self._fused: Fused | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without what it remembers."""
        return Remembered, ()

    def get(self, learner: nn.Module, loss: Any, query_loss: Any) -> Fused | None:
        """What is remembered, if it is still right."""
        fused = self._fused
        if fused is None or self._learner is not learner or not self._unchanged():
            return None
        if (read_loss("loss", loss), read_loss("query_loss", query_loss)) != fused.losses:
            return None
        return fused

    def keep(self, learner: nn.Module, fused: Fused) -> None:
        """Remember."""
        modules = list(learner.modules())
        self._fused, self._learner = fused, learner
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

    def _unchanged(self) -> bool:
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
