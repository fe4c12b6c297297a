"""What the networks share: checks of their arguments, and the identity."""

from __future__ import annotations

from torch import Tensor, nn

from fastkfo.functional.checks import finite, positive

__all__ = ["fitting", "identity", "positive", "rate"]


def rate(name: str, value: float) -> None:
    """Raise unless `value` is a number in [0, 1]."""
    finite(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a rate in [0, 1], got {value}")


def fitting(name: str, features: Tensor, classifier: nn.Module) -> Tensor:
    """Return `features` if the classifier takes that many; `name` is what has to change if not."""
    if isinstance(classifier, nn.Linear) and features.size(-1) != classifier.in_features:
        raise ValueError(
            f"{name}: expected {features.size(-1)}, the features of an input of this size, "
            f"got {classifier.in_features}"
        )
    return features


def identity(x: Tensor) -> Tensor:
    """Return x; unlike a lambda, this pickles."""
    return x
