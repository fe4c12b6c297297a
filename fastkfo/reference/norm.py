"""Batch norm on batch statistics and layer norm, for T tasks at once.

The derivatives of batch norm, with `x̂ = (x − mean) r`, `r = 1/√(var + eps)`, `z = γ x̂ + β`, all
sums over the n samples and pixels of a task's channel, and `dz = dy [z > 0]` where ReLU follows:

    dβ = s1 = Σ dz      dγ = s2 = Σ dz x̂      dx = γ r (dz − s1/n − x̂ s2/n)

and, for cotangents a, b, c of dx, dγ, dβ, with A1 = Σ a, A2 = Σ a x̂, A3 = Σ a dz:

    q = b − γ r A2/n        h = q dz − γ r s2/n a        G = γ (A3 − A1 s1/n − A2 s2/n)
    d(dz) = γ r a + q x̂ + c − γ r A1/n
    dx = r (h − mean(h) − x̂ mean(h x̂)) − r² x̂ G/n        dγ = r G/γ
"""

from __future__ import annotations

import torch
from torch import Tensor


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y = (x − mean) / √(var + eps) · weight + bias`, statistics per task and channel.

    Args:
        x: `[T, N, C, ...]`.
        weight: `[T, C]`, `[C]`, or None for one.
        bias: `[T, C]`, `[C]`, or None for zero.
        eps: is added to the variance.

    Returns:
        y of x's shape, and the mean and the biased variance, `[T, C]`.
    """
    dims = (1, *range(3, x.dim()))
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    y = normalise(x, mean, var, weight, bias, eps)
    return y, mean.flatten(1), var.flatten(1)


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dγ and dβ; differentiable in dy, x and weight.

    Args:
        dy: the cotangent of y, `[T, N, C, ...]`.
        x: likewise.
        weight: γ, `[T, C]`, or None for one.
        bias: β, likewise, or None for zero.
        eps: is added to the variance.
        relu: whether ReLU follows.

    Returns:
        Of x's shape, `[T, C]` and `[T, C]`.
    """
    dims = (1, *range(3, x.dim()))
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    r = torch.rsqrt(var + eps)
    normal = (x - mean) * r
    scale = r if weight is None else r * per_channel(weight, x)
    if relu:
        z = normalise(x, mean, var, weight, bias, eps)
        dy = torch.where(z <= 0, 0.0, dy)
    s1, s2 = dy.sum(dims, keepdim=True), (dy * normal).sum(dims, keepdim=True)
    n = x.numel() // s1.numel()
    dx = scale * (dy - s1 / n - normal * (s2 / n))
    return dx, s2.flatten(1), s1.flatten(1)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`y = (x − mean) / √(var + eps) · weight + bias`, statistics per row.

    Args:
        x: `[T, R, D]`.
        weight: `[T, D]`, or None for one.
        bias: `[T, D]`, or None for zero.
        eps: is added to the variance.

    Returns:
        y of x's shape.
    """
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    y = (x - mean) * torch.rsqrt(var + eps)
    if weight is not None:
        y = y * weight.unsqueeze(1)
    return y if bias is None else y + bias.unsqueeze(1)


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dγ and dβ of `layer_norm`; differentiable in dy, x and weight.

    The same as of batch norm, with `g = γ dy` in place of dy: the weight varies along a row.

    Args:
        dy: the cotangent of y, `[T, R, D]`.
        x: likewise.
        weight: γ, `[T, D]`, or None for one.
        eps: is added to the variance.

    Returns:
        `[T, R, D]`, `[T, D]` and `[T, D]`.
    """
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    r = torch.rsqrt(var + eps)
    normal = (x - mean) * r
    g = dy if weight is None else dy * weight.unsqueeze(1)
    along = (g * normal).mean(-1, keepdim=True)
    dx = r * (g - g.mean(-1, keepdim=True) - normal * along)
    return dx, (dy * normal).sum(1), dy.sum(1)


def batch_norm_double_backward(
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The cotangents of dy, x and γ, for a, b, c, those of dx, dγ, dβ; differentiable in all.

    Args:
        a: of x's shape.
        b: `[T, C]`, or None for zero.
        c: likewise.
        dy: as of `batch_norm_backward`, and so are the others.
        x: see there.
        weight: see there.
        bias: see there.
        eps: see there.
        relu: see there.

    Returns:
        Of x's shape, of x's shape, and `[T, C]`.
    """
    dims = (1, *range(3, x.dim()))
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    r = torch.rsqrt(var + eps)
    normal = (x - mean) * r
    scale = r if weight is None else r * per_channel(weight, x)
    live = torch.ones_like(x)
    if relu:
        live = (~(normalise(x, mean, var, weight, bias, eps) <= 0)).to(x.dtype)
    dz = dy * live

    def average(value: Tensor) -> Tensor:
        return value.mean(dims, keepdim=True)

    s1, s2, a1, a2 = average(dz), average(dz * normal), average(a), average(a * normal)
    g = average(a * dz) - a1 * s1 - a2 * s2
    q = -scale * a2 if b is None else per_channel(b, x) - scale * a2
    h = q * dz - scale * s2 * a
    d_dy = scale * (a - a1) + q * normal + (0.0 if c is None else per_channel(c, x))
    dx = r * (h - average(h) - normal * average(h * normal)) - r * scale * normal * g
    n = x.numel() // max(g.numel(), 1)
    return live * d_dy, dx, (r * g * n).flatten(1)


def layer_norm_double_backward(
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of `layer_norm_backward`.

    Args:
        a: `[T, R, D]`, of dx.
        b: `[T, D]`, of dγ, or None for zero.
        c: `[T, D]`, of dβ, or None for zero.
        dy: as of `layer_norm_backward`, and so are the others.
        x: see there.
        weight: see there.
        eps: see there.

    Returns:
        `[T, R, D]`, `[T, R, D]` and `[T, D]`.
    """
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    r = torch.rsqrt(var + eps)
    normal = (x - mean) * r
    weights = 1.0 if weight is None else weight.unsqueeze(1)
    g = dy * weights

    def average(value: Tensor) -> Tensor:
        return value.mean(-1, keepdim=True)

    s1, s2, a1, a2 = average(g), average(g * normal), average(a), average(a * normal)
    slope = average(a * g) - a1 * s1 - a2 * s2
    dg = r * (a - a1 - normal * a2)
    h = -r * (a * s2 + g * a2)
    d_dy = dg * weights
    if b is not None:
        h = h + b.unsqueeze(1) * dy
        d_dy = d_dy + b.unsqueeze(1) * normal
    if c is not None:
        d_dy = d_dy + c.unsqueeze(1)
    dx = r * (h - average(h) - normal * average(h * normal)) - r * r * normal * slope
    return d_dy, dx, (dy * dg).sum(1)


def normalise(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The same with statistics that are given, `[T, C]`, `[C]`, or of x's rank."""
    mean, var = per_channel(mean, x), per_channel(var, x)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * per_channel(weight, x)
    centred = x - mean
    return centred * scale if bias is None else torch.addcmul(per_channel(bias, x), centred, scale)


def per_channel(value: Tensor, x: Tensor) -> Tensor:
    """`[T, C]` or `[C]`, to be broadcast with x `[T, N, C, ...]`."""
    if value.dim() == x.dim():
        return value
    tasks = value.shape[0] if value.dim() == 2 else 1
    return value.reshape(tasks, 1, value.shape[-1], *[1] * (x.dim() - 3))
