"""The product that makes a factor positive semi-definite."""

from torch import Tensor


def gram(factor: Tensor) -> Tensor:
    """`LᵀL` of L `[..., r, n]`: `[..., n, n]`."""
    return factor.mT @ factor
