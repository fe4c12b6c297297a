"""Cloning modules inside a differentiable graph."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

_T = TypeVar("_T")
_ModuleT = TypeVar("_ModuleT", bound=nn.Module)

# Writing `__dict__` through nn.Module.__setattr__ costs five times as much.
_set_dict = object.__setattr__


def _compiled_reason(module: nn.Module) -> str | None:
    """Say in what way `module` itself (not its children) is compiled, or None."""
    if "_orig_mod" in module._modules and type(module).__name__ == "OptimizedModule":
        return "it is the result of torch.compile(module); pass that module itself"
    state = module.__dict__
    if state.get("_compiled_call_impl") is not None:
        return "its method .compile() was called; build the model without calling it"
    if hasattr(state.get("forward"), "_torchdynamo_orig_callable"):
        return "its forward was replaced by a compiled function; leave forward as it is"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module; pass the Python module that it was made from"
    return None


def _raise_if_compiled(module: nn.Module, name: str) -> None:
    reason = _compiled_reason(module)
    if reason is not None:
        kind = type(getattr(module, "_orig_mod", module)).__name__
        raise TypeError(
            f"{name}: expected a module of plain PyTorch, got a compiled {kind} ({reason}). "
            "Compiled code keeps the original weights, so adapting a clone would change nothing."
        )


def check_not_compiled(module: nn.Module, name: str) -> None:
    """Raise if a module, or any module inside it, is compiled or scripted.

    Args:
        module: The module to look through.
        name: What to call it in the error message.

    Raises:
        TypeError: If `torch.compile`, `module.compile()` or TorchScript made any part of it.
    """
    for submodule in module.modules():
        _raise_if_compiled(submodule, name)


def _identity(x: _T) -> _T:
    return x


def refresh_flat_weights(module: nn.Module) -> None:
    """Make an RNN use the tensors that its `_parameters` hold now."""
    if isinstance(module, nn.RNNBase):
        # The part of RNNBase._apply that matters; the rest reads .grad of non-leaf tensors.
        module._init_flat_weights()
    else:
        module._apply(_identity)


def clone_parameters(param_list: Iterable[Tensor]) -> list[Tensor]:
    """Clone each tensor, differentiably.

    Args:
        param_list: Tensors.

    Returns:
        Their clones, in the same order.
    """
    return [p.clone() for p in param_list]


def clone_named_parameters(param_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clone each tensor of a mapping, differentiably.

    Args:
        param_dict: Tensors by name.

    Returns:
        Their clones under the same names.
    """
    return {name: p.clone() for name, p in param_dict.items()}


def clone_module(module: _T, memo: dict[Tensor, Tensor] | None = None) -> _T:
    """Copy a module so that its parameters are differentiable clones of the original's.

    Parameters, and buffers that require a gradient, become `p.clone()`; every other buffer and
    attribute is shared with the original (batch-norm statistics too). Tensors that are the same
    object stay tied in the clone. Bound methods stored on a module are bound to its clone.

    Args:
        module: Module to clone. Anything else is returned as it is.
        memo: Original tensor -> clone, read and filled, to keep ties across several calls.

    Returns:
        The clone, of the same class.

    Raises:
        TypeError: If any module in the tree is compiled or scripted.

    Source: learn2learn 0.2.0, `utils.clone_module`.
    """
    if not isinstance(module, nn.Module):
        return module
    return _clone(module, {} if memo is None else memo)


def _clone(module: _ModuleT, memo: dict[Tensor, Tensor]) -> _ModuleT:
    # Runs once per module, task and meta-iteration: everything rare hides behind one cheap test.
    cls = type(module)
    state = module.__dict__
    children = module._modules
    if (
        "_compiled_call_impl" in state
        or "_orig_mod" in children
        or "forward" in state
        or "_parameters" not in state
    ):
        _raise_if_compiled(module, "clone_module")

    clone = cls.__new__(cls)
    cloned = state.copy()
    _set_dict(clone, "__dict__", cloned)

    params = state["_parameters"]
    cloned["_parameters"] = new_params = params.copy()
    for key, param in params.items():
        if param is not None:
            copied = memo.get(param)
            if copied is None:
                copied = memo[param] = param.clone()
            new_params[key] = copied

    buffers = state["_buffers"]
    cloned["_buffers"] = new_buffers = buffers.copy()
    for key, buffer in buffers.items():
        if buffer is not None and buffer.requires_grad:
            copied = memo.get(buffer)
            if copied is None:
                copied = memo[buffer] = buffer.clone()
            new_buffers[key] = copied

    cloned["_modules"] = new_children = children.copy()
    for key, child in children.items():
        if child is not None:
            new_children[key] = _clone(child, memo)

    if types.MethodType in map(type, state.values()):
        for key, value in state.items():
            if type(value) is types.MethodType and value.__self__ is module:
                cloned[key] = types.MethodType(value.__func__, clone)
    if hasattr(cls, "flatten_parameters") or "flatten_parameters" in state:
        refresh_flat_weights(clone)
    return clone
