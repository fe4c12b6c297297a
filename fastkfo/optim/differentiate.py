"""Gradients of a loss in the parameters of a learner, with errors that say what to do."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def check_loss(loss: object) -> None:
    """Raise unless `loss` is a scalar tensor with a graph."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss: expected one number, got shape {list(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(
            "loss: expected a tensor with a graph, got one that requires no gradient (computed "
            "under no_grad, detached, or with no adapted parameter in it)"
        )


def gradients(
    loss: Tensor,
    parameters: Iterable[Tensor],
    create_graph: bool,
    retain_graph: bool,
    allow_unused: bool,
    allow_nograd: bool,
) -> list[Tensor | None]:
    """The gradient of a loss in each parameter.

    Args:
        loss: a scalar.
        parameters: the tensors to differentiate in.
        create_graph: whether the gradients are differentiable themselves.
        retain_graph: whether the loss may be differentiated once more.
        allow_unused: whether a parameter that the loss does not depend on is given None.
        allow_nograd: whether a parameter that requires no gradient is given None.

    Returns:
        One gradient or None per parameter.

    Raises:
        TypeError: `loss` is no tensor.
        ValueError: `loss` is not a scalar or has no graph.
        RuntimeError: autograd's own, with the option that would help.
    """
    check_loss(loss)
    parameters = list(parameters)
    wanted = [p for p in parameters if p.requires_grad] if allow_nograd else parameters
    if not wanted:
        return [None] * len(parameters)
    try:
        found = iter(
            torch.autograd.grad(
                loss,
                wanted,
                create_graph=create_graph,
                retain_graph=retain_graph or create_graph,
                allow_unused=allow_unused,
            )
        )
    except RuntimeError as error:
        raise RuntimeError(f"{error}{_hint(str(error))}") from error
    return [next(found) if p.requires_grad or not allow_nograd else None for p in parameters]


def through_last_update(
    params: list[Tensor], phi: list[Tensor], grads: list[Tensor | None], allow_unused: bool
) -> list[Tensor | None]:
    """The gradients in φ of a loss whose gradients in the updated θ are constants.

    First order: the graph of the loss is not kept, that of the update is, so that φ's own updates
    stay differentiable in φ.

    Args:
        params: θ, after their last update.
        phi: φ.
        grads: the gradients in θ, or None.
        allow_unused: whether a parameter in φ that the update does not use is given None.

    Returns:
        The gradients in φ.
    """
    live = [(p, g) for p, g in zip(params, grads, strict=True) if g is not None and p.requires_grad]
    return list(
        torch.autograd.grad(
            [p for p, _ in live],
            phi,
            [g for _, g in live],
            create_graph=True,
            allow_unused=allow_unused,
        )
    )


def own_gradients(params: Sequence[Tensor]) -> list[Tensor | None]:
    """The parameters' `.grad`; ValueError if there is none."""
    with warnings.catch_warnings():  # asking a non-leaf tensor for .grad warns
        warnings.simplefilter("ignore")
        grads = [p.grad for p in params]
    if params and all(g is None for g in grads):
        raise ValueError("grads: expected a list, or parameters with a .grad, got None and none")
    return grads


def _hint(error: str) -> str:
    if "does not require grad" in error:
        return " (fastkfo: allow_nograd=True skips parameters that require no gradient.)"
    if "not have been used" in error:
        return " (fastkfo: allow_unused=True skips parameters that the loss does not use.)"
    return ""
