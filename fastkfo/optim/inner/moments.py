"""Moving averages and roots of optimizers."""

from __future__ import annotations

import torch
from torch import Tensor


def moving_average(old: Tensor | None, new: Tensor, decay: float) -> Tensor:
    """`decay · old + (1 − decay) · new`, None counting as zeros."""
    if old is None:
        return (1 - decay) * new
    return torch.add(decay * old, new, alpha=1 - decay)


def root(x: Tensor) -> Tensor:
    """`√x`, whose derivatives where x is 0 are 0 and not infinite."""
    zero = x == 0
    # Twice: the root of 0 must not be taken, or its infinite derivative times 0 would be NaN.
    return x.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
