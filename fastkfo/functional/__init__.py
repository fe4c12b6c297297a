"""The differentiable ops, for those who call them directly."""

from fastkfo.functional.cross_entropy import cross_entropy
from fastkfo.functional.gram import gram
from fastkfo.functional.kron import kron_transform, kron_update

__all__ = ["cross_entropy", "gram", "kron_transform", "kron_update"]
