"""Learnable optimizers: transforms of gradients, and the updates made of them."""

from fastkfo.optim import inner
from fastkfo.optim.inner import PerStepLR
from fastkfo.optim.learnable_optimizer import LearnableOptimizer
from fastkfo.optim.parameter_update import ParameterUpdate
from fastkfo.optim.transforms import (
    KroneckerTransform,
    MetaCurvatureTransform,
    ModuleTransform,
    ReshapedTransform,
    TransformDictionary,
)
from fastkfo.optim.update_rules import DifferentiableSGD

__all__ = [
    "DifferentiableSGD",
    "KroneckerTransform",
    "LearnableOptimizer",
    "MetaCurvatureTransform",
    "ModuleTransform",
    "ParameterUpdate",
    "PerStepLR",
    "ReshapedTransform",
    "TransformDictionary",
    "inner",
]
