"""The differentiable ops, for those who call them directly."""

from fastkfo.functional.cross_entropy import cross_entropy
from fastkfo.functional.gram import gram
from fastkfo.functional.inner_loop import InnerLoopResult, Layer, inner_loop
from fastkfo.functional.kron import kron_transform, kron_update

__all__ = [
    "InnerLoopResult",
    "Layer",
    "cross_entropy",
    "gram",
    "inner_loop",
    "kron_transform",
    "kron_update",
]
