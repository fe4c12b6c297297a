"""The gradient transforms as formulas in plain PyTorch: what U(G) is for each kind of φ.

A parameter's φ is a named tuple of tensors; its type says which formula.

    Factors     U = A G C + β,  A = LᵀL, C = RᵀR (psd)  or  A = L, C = R      Meta-KFO
    Scale       U = s ∘ G                                                     Meta-SGD
    Curvature   one matrix per axis of G                                      Meta-Curvature
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

__all__ = [
    "Curvature",
    "Factors",
    "Phi",
    "Scale",
    "flatten",
    "kronecker",
    "like",
    "phi_of",
    "update",
]


class Factors(NamedTuple):
    """Factors of one parameter's Kronecker transform.

    Attributes:
        left: L, ``[n, n]``.
        right: R, ``[m, m]``.
        bias: β, ``[n, m]``, or None.
    """

    left: torch.Tensor
    right: torch.Tensor
    bias: torch.Tensor | None = None


class Scale(NamedTuple):
    """One factor per element of a parameter.

    Attributes:
        scale: s, of the parameter's shape.
    """

    scale: torch.Tensor


class Curvature(NamedTuple):
    """One matrix per axis of a parameter, the axes of a convolution's kernel being one.

    Attributes:
        first: ``[a, a]`` for the first axis, or for a vector its elementwise factors ``[a]``.
        second: ``[b, b]`` for the second axis, or None for a vector.
        kernel: ``[f, f]`` for the kernel's f elements, or None for a vector or a matrix.
    """

    first: torch.Tensor
    second: torch.Tensor | None = None
    kernel: torch.Tensor | None = None


Phi = Factors | Scale | Curvature


def update(gradient: torch.Tensor, phi: Phi, psd: bool = True) -> torch.Tensor:
    """Computes U(G).

    Args:
        gradient: A parameter's gradient G.
        phi: Its transform.
        psd: See :func:`kronecker`; of no meaning for the others.

    Returns:
        The update, of the gradient's shape.
    """
    if isinstance(phi, Factors):
        return kronecker(gradient, phi, psd)
    if isinstance(phi, Scale):
        return phi.scale * gradient
    return _curvature(gradient, phi)


def kronecker(gradient: torch.Tensor, factors: Factors, psd: bool = True) -> torch.Tensor:
    """Computes U(G) = A G C + β.

    Args:
        gradient: A parameter's gradient; 1-D, 2-D, or 4-D (a convolution's weight).
        factors: Its factors.
        psd: Whether A = LᵀL and C = RᵀR, instead of L and R.

    Returns:
        The update, of the gradient's shape.
    """
    left, right, bias = factors
    if psd:
        left, right = left.T @ left, right.T @ right
    update = left @ gradient.reshape(-1, left.shape[0], right.shape[0]) @ right  # [B, n, m]
    if bias is not None:
        update = update + bias
    return update.reshape(gradient.shape)


def _curvature(gradient: torch.Tensor, phi: Curvature) -> torch.Tensor:
    """``U[a, b, f] = Σ first[a, a'] second[b', b] kernel[f, f'] G[a', b', f']``."""
    first, second, kernel = phi
    if second is None:
        return first * gradient
    if kernel is None:
        return first @ gradient @ second
    size_a, size_b, size_f = first.shape[0], second.shape[0], kernel.shape[0]
    update = second.T @ gradient.reshape(size_a, size_b, size_f) @ kernel.T  # [a, b, f]
    return (first @ update.reshape(size_a, -1)).reshape(gradient.shape)


def phi_of(transform: Any) -> Phi | None:
    """Reads φ out of a transform of fastkfo's or learn2learn's GBML.

    Args:
        transform: One of ``learner.compute_update.transforms_modules``.

    Returns:
        Its tensors themselves, not copies; None if it is of a kind not known here.
    """
    inner: Any = getattr(transform, "transform", None)
    if hasattr(inner, "left") and hasattr(inner, "right"):
        return Factors(inner.left, inner.right, inner.bias)
    if hasattr(transform, "mc"):
        return Curvature(transform.mc)
    if hasattr(transform, "mc_in"):
        return Curvature(transform.mc_in, transform.mc_out, getattr(transform, "mc_f", None))
    return None


def flatten(phis: Iterable[Phi]) -> list[torch.Tensor]:
    """Lists the tensors of several φ, in order.

    Args:
        phis: The φ.

    Returns:
        Their tensors, without the Nones.
    """
    return [tensor for phi in phis for tensor in phi if tensor is not None]


def like(phi: Phi, tensors: Iterator[torch.Tensor]) -> Phi:
    """Makes a φ of the same kind from the next tensors: the inverse of :func:`flatten`.

    Args:
        phi: What it is to look like.
        tensors: As many as it has, and more.

    Returns:
        The new φ.
    """
    pieces: Any = [None if old is None else next(tensors) for old in phi]
    return type(phi)(*pieces)
