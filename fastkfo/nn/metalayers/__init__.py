"""Modules that wrap others, to change parts of them or to transform their parameters."""

from fastkfo.nn.metalayers.metamodule import MetaModule
from fastkfo.nn.metalayers.parameter_transform import ParameterTransform

__all__ = ["MetaModule", "ParameterTransform"]
