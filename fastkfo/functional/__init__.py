"""The differentiable ops, for those who call them directly."""

from fastkfo.functional.gram import gram
from fastkfo.functional.kron import kron_transform, kron_update

__all__ = ["gram", "kron_transform", "kron_update"]
