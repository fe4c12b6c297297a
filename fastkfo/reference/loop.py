"""The meta-gradient of MAML and Meta-KFO in plain PyTorch, one task after the other.

The shortest formula we know: what fused and batched paths must agree with, and what they are
timed against. One task, with learner parameters θ, transform factors φ = (L, R, β) and inner
learning rate α:

    g_k     = ∇ℓ_s(θ_k)
    φ_k     = φ_{k-1} + α² (∂U_{φ_{k-1}}(g_{k-1})/∂φ)ᵀ g_k      (adapt_transform and k ≥ 1 only)
    θ_{k+1} = θ_k − α U_{φ_k}(g_k)
    U(G)    = A G C + β,  A = LᵀL, C = RᵀR (psd)  or  A = L, C = R

G is the gradient viewed as [B, n, m]: a 2-D weight is [1, n, m], a 1-D one [1, n, 1], a 4-D
convolution weight [out, n = in, m = kh * kw]. Without φ, U(G) = G, which is MAML. Other transforms
are in :mod:`fastkfo.reference.transforms`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import grad
from torch.func import functional_call

from fastkfo.reference.transforms import (
    Factors,
    Phi,
    Scale,
    flatten,
    kronecker,
    like,
    phi_of,
    update,
)

__all__ = ["Factors", "MetaGradient", "adapt", "call", "factors_of", "kronecker", "meta_gradient"]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class MetaGradient(NamedTuple):
    """What :func:`meta_gradient` returns.

    Attributes:
        losses: Query loss of each adapted task, ``[T]``, detached.
        parameters: Gradient of their mean for every parameter of the model, by name.
        factors: The same for every parameter's factors, by the parameter's name.
        features: The same for every parameter of the feature extractor.
    """

    losses: torch.Tensor
    parameters: dict[str, torch.Tensor]
    factors: dict[str, Phi]
    features: dict[str, torch.Tensor]


def adapt(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    loss: Loss,
    steps: int,
    lr: float | torch.Tensor,
    factors: Mapping[str, Phi] | None = None,
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
        support = loss(call(model, theta, x), y)
        gradients = grad(support, list(theta.values()), create_graph=not first_order)
        g = dict(zip(theta, gradients, strict=True))
        if adapt_transform and step > 0:
            phi = {name: _adapt_factors(f, updates[name], g[name], lr) for name, f in phi.items()}
        updates = {n: update(g[n], phi[n], psd) if n in phi else g[n] for n in theta}
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
    factors: Mapping[str, Phi] | None = None,
    psd: bool = True,
    first_order: bool = False,
    adapt_transform: bool = False,
    features: nn.Module | None = None,
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
        features: A feature extractor in front of the model, as in ANIL: it sees a task's support
            and query together, is not adapted, and is trained through the query loss.

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
    psi = {} if features is None else _trainable(features)
    inputs = [*theta.values(), *flatten(factors.values()), *psi.values()]
    total = [torch.zeros_like(tensor) for tensor in inputs]
    losses = []
    for task in range(len(x_s)):
        support, queries = x_s[task], x_q[task]
        if features is not None:
            seen = features(torch.cat([support, queries]))
            support, queries = seen.split([len(support), len(queries)])
        adapted = adapt(
            model,
            support,
            y_s[task],
            loss=loss,
            steps=steps,
            lr=lr,
            factors=factors,
            psd=psd,
            first_order=first_order,
            adapt_transform=adapt_transform,
        )
        query = loss(call(model, adapted, queries), y_q[task])
        for sum_, g in zip(
            total, grad(query / len(x_s), inputs, materialize_grads=True), strict=True
        ):
            sum_.add_(g)
        losses.append(query.detach())
    gradients = iter(total)
    return MetaGradient(
        torch.stack(losses),
        {name: next(gradients) for name in theta},
        {name: like(f, gradients) for name, f in factors.items()},
        {name: next(gradients) for name in psi},
    )


def factors_of(learner: Any) -> dict[str, Phi]:
    """Reads every parameter's transform out of a learner.

    Args:
        learner: fastkfo's or learn2learn's GBML with Kronecker or Meta-Curvature transforms, or
            MetaSGD (whose rates scale the gradient: they go with ``lr=1``).

    Returns:
        The tensors themselves (not copies) by the name the parameter has in ``learner.module``.

    Raises:
        TypeError: If a transform is of another kind.
    """
    names = [name for name, _ in learner.module.named_parameters()]
    if hasattr(learner, "lrs"):
        return {name: Scale(rate) for name, rate in zip(names, learner.lrs, strict=True)}
    transforms = learner.compute_update.transforms_modules
    phis = {}
    for name, index in zip(names, learner.compute_update.transforms_indices, strict=True):
        if index is None:
            continue
        phi = phi_of(transforms[index])
        if phi is None:
            raise TypeError(
                "learner: expected a Kronecker or a Meta-Curvature transform for "
                f"{name!r}, got {type(transforms[index]).__name__}"
            )
        phis[name] = phi
    return phis


def call(model: nn.Module, theta: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Runs the model with other parameters.

    ``torch.func.functional_call`` leaves them in a model that holds one submodule under two names
    (OmniglotCNN does). So every place of a parameter is named once here.

    Args:
        model: The model; it is not changed.
        theta: Tensors by parameter name; tied parameters take that of their first name.
        x: Its input.

    Returns:
        Its output.
    """
    tensors = {id(p): theta[name] for name, p in model.named_parameters() if name in theta}
    places = {
        f"{prefix}.{name}" if prefix else name: tensors[id(p)]
        for prefix, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(p) in tensors
    }
    output: torch.Tensor = functional_call(model, places, (x,), tie_weights=False)
    return output


def _adapt_factors(
    phi: Phi, last: torch.Tensor, gradient: torch.Tensor, lr: float | torch.Tensor
) -> Phi:
    """Takes φ + α² (∂U/∂φ)ᵀ g; the last U's graph reaches φ through that update alone."""
    inputs = flatten([phi])
    deltas = grad(last, inputs, grad_outputs=gradient, create_graph=True)
    return like(phi, iter([f + lr**2 * d for f, d in zip(inputs, deltas, strict=True)]))


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
