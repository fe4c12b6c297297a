"""Replacing layers of a model: its copy, a linear layer by name, what may stand in for it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["check_linear", "check_model", "check_plain", "copy_of", "find_linear", "put"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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
    check_plain(where, layer, nn.Linear)
    if set(layer._parameters) != {"weight", "bias"}:
        raise TypeError(
            f"{where}: expected an nn.Linear with parameters weight and bias, got one with "
            f"{list(layer._parameters)}"
        )


def check_plain(where: str, layer: Any, kind: type[nn.Module]) -> None:
    """Raises TypeError unless a layer has the forward of a class of PyTorch's, and no hooks."""
    state = vars(layer)
    own = "forward" in state or type(layer).forward is not kind.forward
    if own or any([state[name] for name in HOOKS]):
        raise TypeError(
            f"{where}: expected an nn.{kind.__name__} without hooks, got a {type(layer).__name__} "
            f"with {'a forward of its own' if own else 'hooks'}"
        )


def check_model(model: Any) -> None:
    """Raises unless it is a module whose layers may be replaced: a learner's may not."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if (found := _model_at(module)) is not None:
            where = f"itself, at {name!r}," if name else "itself,"
            raise TypeError(
                f"model: expected the model that a learner adapts, got the {type(module).__name__} "
                f"{where} whose rates or transforms are those of its present layers; pass {found}"
            )
        if any([is_lazy(p) for p in module._parameters.values()]):
            raise ValueError(
                f"model: expected layers that have their parameters, got the lazy "
                f"{type(module).__name__} at {name!r}; call the model once"
            )


def _model_at(module: nn.Module) -> str | None:
    """Where a learner has the model that it adapts; None of what is no learner."""
    # Learners import this package, so that they say it themselves; learn2learn's have methods.
    cls = type(module)
    other = "its `module`" if hasattr(cls, "adapt") and hasattr(cls, "clone") else None
    return getattr(cls, "_model_at", other)
