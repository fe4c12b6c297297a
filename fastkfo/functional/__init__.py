"""The differentiable ops, for those who call them directly."""

from fastkfo.functional.conv import conv2d
from fastkfo.functional.cross_entropy import cross_entropy
from fastkfo.functional.gram import gram
from fastkfo.functional.inner_loop import InnerLoopResult, Layer, inner_loop
from fastkfo.functional.kron import kron_transform, kron_update
from fastkfo.functional.layer_norm import layer_norm
from fastkfo.functional.linear import linear
from fastkfo.functional.norm import BatchNormResult, batch_norm
from fastkfo.functional.pool import avg_pool2d, max_pool2d

__all__ = [
    "BatchNormResult",
    "InnerLoopResult",
    "Layer",
    "avg_pool2d",
    "batch_norm",
    "conv2d",
    "cross_entropy",
    "gram",
    "inner_loop",
    "kron_transform",
    "kron_update",
    "layer_norm",
    "linear",
    "max_pool2d",
]
