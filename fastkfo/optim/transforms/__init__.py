"""Factories that make a module which transforms one parameter's gradient."""

from fastkfo.optim.transforms.kronecker_transform import KroneckerTransform
from fastkfo.optim.transforms.metacurvature_transform import MetaCurvatureTransform
from fastkfo.optim.transforms.module_transform import ModuleTransform, ReshapedTransform
from fastkfo.optim.transforms.transform_dictionary import TransformDictionary

__all__ = [
    "KroneckerTransform",
    "MetaCurvatureTransform",
    "ModuleTransform",
    "ReshapedTransform",
    "TransformDictionary",
]
