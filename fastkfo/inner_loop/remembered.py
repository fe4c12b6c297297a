"""What a learner was read as, remembered until something changes."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastkfo.inner_loop.fused import Fused, read_loss
from fastkfo.inner_loop.watched import Watched


class Remembered:
    """A `Fused` of a learner, for as long as nothing changes that it depends on.

    Reading a learner takes longer than all steps of a small one.
    """

    def __init__(self) -> None:
        self._fused: Fused | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without what it remembers."""
        return Remembered, ()

    def get(self, learner: nn.Module, loss: Any, query_loss: Any) -> Fused | None:
        """What is remembered, if it is still right."""
        fused = self._fused
        if fused is None or self._learner is not learner or not self._watched.unchanged():
            return None
        if (read_loss("loss", loss), read_loss("query_loss", query_loss)) != fused.losses:
            return None
        return fused

    def keep(self, learner: nn.Module, fused: Fused) -> None:
        """Remember."""
        self._fused, self._learner = fused, learner
        self._watched = Watched(learner.modules())
