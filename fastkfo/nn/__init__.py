"""Modules for meta-learning, under learn2learn's names."""

from fastkfo.nn import kroneckers, linnet, metalayers, misc, protonet
from fastkfo.nn.kroneckers import (
    KroneckerLinear,
    KroneckerLSTM,
    KroneckerNetwork,
    KroneckerRNN,
    kronecker_addmm,
)
from fastkfo.nn.linnet import (
    LinNet,
    add_linear_layers,
    collapse,
    collapse_layers,
    split_linear,
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
    "LinNet",
    "MetaModule",
    "ParameterTransform",
    "PrototypicalClassifier",
    "Scale",
    "add_linear_layers",
    "collapse",
    "collapse_layers",
    "compute_prototypes",
    "freeze",
    "kronecker_addmm",
    "kroneckers",
    "linnet",
    "metalayers",
    "misc",
    "protonet",
    "split_linear",
    "unfreeze",
]
