"""The meta-gradient of MAML and Meta-KFO in plain PyTorch, one task after the other.

The shortest formula we know: what fused and batched paths must agree with, and what they are
timed against. One task, with learner parameters θ, transform factors φ = (L, R, β) and inner
learning rate α:

    g_k     = ∇ℓ_s(θ_k)
    φ_k     = φ_{k-1} + α² (∂U_{φ_{k-1}}(g_{k-1})/∂φ)ᵀ g_k      (adapt_transform and k ≥ 1 only)
    θ_{k+1} = θ_k − α U_{φ_k}(g_k)
    U(G)    = A G C + β,  A = LᵀL, C = RᵀR (psd)  or  A = L, C = R

G is the gradient viewed as [B, n, m]: a 2-D weight is [1, n, m], a 1-D one [1, n, 1], a 4-D
convolution weight [out, n = in, m = kh * kw]. Without φ, U(G) = G, which is MAML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import grad
from torch.func import functional_call

__all__ = ["Factors", "MetaGradient", "adapt", "factors_of", "kronecker", "meta_gradient"]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


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


class MetaGradient(NamedTuple):
    """What :func:`meta_gradient` returns.

    Attributes:
        losses: Query loss of each adapted task, ``[T]``, detached.
        parameters: Gradient of their mean for every parameter of the model, by name.
        factors: The same for every parameter's factors, by the parameter's name.
    """

    losses: torch.Tensor
    parameters: dict[str, torch.Tensor]
    factors: dict[str, Factors]


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


def adapt(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    loss: Loss,
    steps: int,
    lr: float | torch.Tensor,
    factors: Mapping[str, Factors] | None = None,
    psd: bool = True,
    first_order: bool = False,
    adapt_transform: bool = False,
) -> dict[str, torch.Tensor]:
    """Adapts the model's parameters to one task.

    Args:
        model: The learner; it is not changed (buffers, such as running statistics, are its own).
        x: Support inputs, ``[S, ...]``.
        y: Support targets, ``[S, ...]``.
        loss: Maps predictions and targets to a scalar.
        steps: Inner steps K.
        lr: Inner learning rate α.
        factors: Factors by parameter name; parameters without any are updated by plain SGD.
        psd: See :func:`kronecker`.
        first_order: Whether g_k counts as a constant.
        adapt_transform: Whether φ, too, is adapted from the second step on.

    Returns:
        The adapted parameters θ_K by name, differentiable in the model's and in the factors.
    """
    theta = _trainable(model)
    phi = dict(factors or {})
    updates: dict[str, torch.Tensor] = {}
    for step in range(steps):
        support = loss(functional_call(model, theta, (x,)), y)
        gradients = grad(support, list(theta.values()), create_graph=not first_order)
        g = dict(zip(theta, gradients, strict=True))
        if adapt_transform and step > 0:
            phi = {name: _adapt_factors(f, updates[name], g[name], lr) for name, f in phi.items()}
        updates = {n: kronecker(g[n], phi[n], psd) if n in phi else g[n] for n in theta}
        theta = {n: theta[n] - lr * updates[n] for n in theta}
    return theta


def meta_gradient(
    model: nn.Module,
    x_s: torch.Tensor,
    y_s: torch.Tensor,
    x_q: torch.Tensor,
    y_q: torch.Tensor,
    *,
    loss: Loss,
    steps: int,
    lr: float | torch.Tensor,
    factors: Mapping[str, Factors] | None = None,
    psd: bool = True,
    first_order: bool = False,
    adapt_transform: bool = False,
) -> MetaGradient:
    """Computes the gradient of the mean query loss after adaptation, for θ_0 and φ_0.

    Args:
        model: See :func:`adapt`.
        x_s: Support inputs, ``[T, S, ...]``.
        y_s: Support targets, ``[T, S, ...]``.
        x_q: Query inputs, ``[T, Q, ...]``.
        y_q: Query targets, ``[T, Q, ...]``.
        loss: See :func:`adapt`; also the query loss.
        steps: See :func:`adapt`.
        lr: See :func:`adapt`.
        factors: See :func:`adapt`; each must require a gradient.
        psd: See :func:`kronecker`.
        first_order: See :func:`adapt`.
        adapt_transform: See :func:`adapt`.

    Returns:
        Query losses and gradients; no ``.grad`` is touched.

    Raises:
        ValueError: If the four inputs do not hold the same number of tasks, at least one.
    """
    if not len(x_s) == len(y_s) == len(x_q) == len(y_q) or len(x_s) == 0:
        raise ValueError(
            "x_s, y_s, x_q, y_q: expected the same number of tasks in each, at least 1, got "
            f"{len(x_s)}, {len(y_s)}, {len(x_q)}, {len(y_q)}"
        )
    factors = dict(factors or {})
    theta = _trainable(model)
    inputs = [*theta.values(), *_flat(factors.values())]
    total = [torch.zeros_like(tensor) for tensor in inputs]
    losses = []
    for task in range(len(x_s)):
        adapted = adapt(
            model,
            x_s[task],
            y_s[task],
            loss=loss,
            steps=steps,
            lr=lr,
            factors=factors,
            psd=psd,
            first_order=first_order,
            adapt_transform=adapt_transform,
        )
        query = loss(functional_call(model, adapted, (x_q[task],)), y_q[task])
        for sum_, g in zip(
            total, grad(query / len(x_s), inputs, materialize_grads=True), strict=True
        ):
            sum_.add_(g)
        losses.append(query.detach())
    gradients = iter(total)
    return MetaGradient(
        torch.stack(losses),
        {name: next(gradients) for name in theta},
        {name: _like(f, gradients) for name, f in factors.items()},
    )


def factors_of(learner: Any) -> dict[str, Factors]:
    """Reads the factors out of a GBML with a Kronecker transform.

    Args:
        learner: fastkfo's or learn2learn's GBML.

    Returns:
        The factors themselves (not copies) by the name the parameter has in ``learner.module``.

    Raises:
        TypeError: If a transform has no ``left`` and ``right``.
    """
    update = learner.compute_update
    names = [name for name, _ in learner.module.named_parameters()]
    factors = {}
    for name, index in zip(names, update.transforms_indices, strict=True):
        if index is None:
            continue
        transform: Any = getattr(update.transforms_modules[index], "transform", None)
        if not (hasattr(transform, "left") and hasattr(transform, "right")):
            raise TypeError(
                f"learner: expected a Kronecker transform for {name!r}, got "
                f"{type(update.transforms_modules[index]).__name__}"
            )
        factors[name] = Factors(transform.left, transform.right, transform.bias)
    return factors


def _adapt_factors(
    factors: Factors, update: torch.Tensor, gradient: torch.Tensor, lr: float | torch.Tensor
) -> Factors:
    """Takes φ + α² (∂U/∂φ)ᵀ g; U's graph reaches φ through the last update alone."""
    inputs = _flat([factors])
    deltas = grad(update, inputs, grad_outputs=gradient, create_graph=True)
    return _like(factors, iter([f + lr**2 * d for f, d in zip(inputs, deltas, strict=True)]))


def _flat(factors: Iterable[Factors]) -> list[torch.Tensor]:
    return [tensor for f in factors for tensor in f if tensor is not None]


def _like(factors: Factors, tensors: Iterator[torch.Tensor]) -> Factors:
    left, right = next(tensors), next(tensors)
    return Factors(left, right, None if factors.bias is None else next(tensors))


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
