"""Modules for meta-learning, under learn2learn's names."""

from fastkfo.nn import kroneckers, metalayers, misc, protonet
from fastkfo.nn.kroneckers import (
    KroneckerLinear,
    KroneckerLSTM,
    KroneckerNetwork,
    KroneckerRNN,
    kronecker_addmm,
)
from fastkfo.nn.metalayers import MetaModule, ParameterTransform
from fastkfo.nn.misc import Flatten, Lambda, Scale, freeze, unfreeze
from fastkfo.nn.protonet import PrototypicalClassifier, compute_prototypes

__all__ = [
    "Flatten",
    "KroneckerLSTM",
    "KroneckerLinear",
    "KroneckerNetwork",
    "KroneckerRNN",
    "Lambda",
    "MetaModule",
    "ParameterTransform",
    "PrototypicalClassifier",
    "Scale",
    "compute_prototypes",
    "freeze",
    "kronecker_addmm",
    "kroneckers",
    "metalayers",
    "misc",
    "protonet",
    "unfreeze",
]
