"""Methods by name: what is adapted, and by which rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastkfo.algorithms import GBML, MAML, MetaSGD
from fastkfo.inner_loop import InnerLoop
from fastkfo.nn import KroneckerLinear, KroneckerNetwork, add_linear_layers
from fastkfo.optim import KroneckerTransform, MetaCurvatureTransform
from fastkfo.training import backbones
from fastkfo.training.config import TrainConfig
from fastkfo.training.sources import settled

__all__ = ["METHODS", "Built", "build", "check_method"]

#: Method: what it is.
METHODS = {
    "maml": "MAML: the whole network is adapted by SGD",
    "anil": "ANIL: the head alone is adapted",
    "maml-kfo": "Meta-KFO: every gradient goes through a learned Kronecker-factored transform",
    "anil-kfo": "Meta-KFO on the head alone",
    "meta-sgd": "Meta-SGD: a learned rate for every number",
    "meta-curvature": "Meta-Curvature: learned factors for every axis",
    "maml-linnet": "MAML with linear layers added before the head",
}


@dataclass(frozen=True)
class Built:
    """A learner, and how it is run.

    Attributes:
        learner: What is adapted: MAML, MetaSGD or GBML.
        features: What is in front of it and trained but not adapted, or None.
        train: The inner loop that trains both.
        evaluate: The same on the same tensors, for `no_grad`: running statistics stay.
    """

    learner: MAML | MetaSGD | GBML
    features: nn.Module | None
    train: InnerLoop
    evaluate: InnerLoop


def build(config: TrainConfig, shape: Sequence[int], outputs: int, regression: bool) -> Built:
    """Builds a method's learner, with weights that the seed alone decides.

    Methods with the same backbone start from the same weights of it and of the head.

    Args:
        config: The method and its options; what it leaves open is settled by the data set.
        shape: Of one input.
        outputs: Of the head.
        regression: Whether the loss is the mean squared error; else cross-entropy.

    Returns:
        The learner and its inner loops, on ``config.device`` in ``config.dtype``.

    Raises:
        ValueError: If the method or backbone is unknown, or an option does not go with it.
    """
    config = settled(config)
    check_method(config)
    features, model = _networks(config, shape, outputs)
    place = {"device": torch.device(config.device), "dtype": getattr(torch, config.dtype)}
    learner = _learner(config, model.to(**place))  # its rates and factors are as the model is
    learner.to(**place)
    if features is not None:
        features.to(**place)
    loops = [
        InnerLoop(
            learner,
            F.mse_loss if regression else F.cross_entropy,
            config.steps,
            features=features,
            buffers=buffers,
        )
        for buffers in ("shared", "frozen")
    ]
    return Built(learner, features, *loops)


def check_method(config: TrainConfig) -> None:
    """Raises unless the method is known and the options go with it.

    Raises:
        ValueError: It is not, or one does not.
    """
    if config.method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {config.method!r}")
    kfo = config.method.endswith("-kfo")
    if config.hidden_kfo_layers and not kfo:
        raise ValueError(
            f"hidden_kfo_layers: expected 0 with method {config.method!r}, which has no Kronecker "
            f"factors, got {config.hidden_kfo_layers}"
        )
    if config.adapt_transform and not (kfo or config.method == "meta-curvature"):
        raise ValueError(
            f"adapt_transform: expected False with method {config.method!r}, which has no "
            "transform, got True"
        )


def _networks(
    config: TrainConfig, shape: Sequence[int], outputs: int
) -> tuple[nn.Module | None, nn.Module]:
    """What is in front of the learner, or None, and what is adapted."""
    numbers = np.random.get_state()  # noqa: NPY002 (initialisers of vision.models draw from it)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            np.random.seed(config.seed % 2**32)  # noqa: NPY002
            features, size = backbones.features(config.backbone, shape)
            head: nn.Module = nn.Linear(size, outputs)
            if config.method == "maml-linnet":
                head = add_linear_layers(head, config.linear_layers)
    finally:
        np.random.set_state(numbers)  # noqa: NPY002
    if config.method.startswith("anil"):
        return features, head
    # Flat where it can be: an InnerLoop takes linear layers and ReLU in one native call.
    front = list(features) if type(features) is nn.Sequential else [features]
    return None, nn.Sequential(*front, head)


def _learner(config: TrainConfig, model: nn.Module) -> MAML | MetaSGD | GBML:
    lr: Any = config.fast_lr  # a float, since the config is settled
    if config.method == "meta-sgd":
        return MetaSGD(model, lr=lr, first_order=config.first_order)
    if config.method in ("maml", "anil", "maml-linnet"):
        return MAML(model, lr=lr, first_order=config.first_order)
    kfo = config.method.endswith("-kfo")
    return GBML(
        model,
        transform=_kronecker(config.hidden_kfo_layers) if kfo else MetaCurvatureTransform,
        lr=lr,
        adapt_transform=bool(config.adapt_transform),
        first_order=config.first_order,
    )


class _NearerToOne(KroneckerNetwork):
    """With ε = 0.1: where factors are nearer to 1, a step of Adam changes them less.

    Of four seeds on digits with a meta_lr of 0.003, all trained better so, or as well.
    """

    init_scale = 0.1


def _kronecker(hidden: int) -> KroneckerTransform:
    """Plain factors U = LᵀL G RᵀR, or for H hidden layers K_H ∘ tanh ∘ … ∘ tanh ∘ K_0."""
    if hidden == 0:
        return KroneckerTransform(KroneckerLinear)
    return KroneckerTransform(partial(_NearerToOne, hidden_layers=hidden))
