"""Replacing layers of a model: its copy, a linear layer by name, what may stand in for it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

__all__ = ["check_linear", "check_model", "copy_of", "find_linear", "put"]


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy; parameters inside a graph (a clone's) are detached."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def find_linear(model: nn.Module, name: str) -> nn.Linear:
    """The plain `nn.Linear` of that name, which shares no parameter.

    Returns:
        The layer, not a copy.

    Raises:
        TypeError: It is no plain `nn.Linear`.
        ValueError: There is none, or it shares a parameter.
    """
    try:
        layer: Any = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"name: expected a layer of the model, as in named_modules, got {name!r}"
        ) from None
    check_linear(f"name: at {name!r}", layer)
    found: nn.Linear = layer
    every = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    if any(every.count(id(p)) > 1 for p in layer.parameters()):
        raise ValueError(f"name: expected a layer that shares no weight, got {name!r}, which does")
    return found


def put(model: nn.Module, name: str, made: nn.Module) -> nn.Module:
    """The model with a module in the place of another."""
    if not name:
        return made
    parent, _, key = name.rpartition(".")
    model.get_submodule(parent)._modules[key] = made
    return model


def check_linear(where: str, layer: Any) -> None:
    """Raises TypeError unless a layer is `nn.Linear`, no subclass, with its two parameters."""
    if type(layer) is not nn.Linear:
        raise TypeError(f"{where}: expected an nn.Linear, got {type(layer).__name__}")
    hooks = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    if hooks or set(layer._parameters) != {"weight", "bias"}:
        raise TypeError(
            f"{where}: expected an nn.Linear without hooks and with parameters weight and bias, "
            f"got one with {'hooks or a forward of its own' if hooks else list(layer._parameters)}"
        )


def check_model(model: Any) -> None:
    """Raises unless it is a module whose layers may be replaced: a learner's may not."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "adapt") and hasattr(model, "clone"):
        raise TypeError(
            f"model: expected the model that a learner adapts, got the {type(model).__name__} "
            "itself, whose rates or transforms are those of its present layers; pass its `module`"
        )
