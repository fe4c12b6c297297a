"""Cloning, updating and detaching modules inside a differentiable graph; small helpers.

Source: the interface is learn2learn 0.2.0's `utils` (https://github.com/learnables/learn2learn).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import types
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

__all__ = [
    "accuracy",
    "check_not_compiled",
    "clone_distribution",
    "clone_module",
    "clone_named_parameters",
    "clone_parameters",
    "detach_distribution",
    "detach_module",
    "flatten_config",
    "magic_box",
    "replace_parameters",
    "update_module",
    "warn_once",
]

_T = TypeVar("_T")
_ModuleT = TypeVar("_ModuleT", bound=nn.Module)

# Writing `__dict__` through nn.Module.__setattr__ costs five times as much.
_set_dict = object.__setattr__


def magic_box(x: Any) -> Any:
    """Evaluate to 1 with the gradient of `x`: exp(x - stop_gradient(x)).

    Args:
        x: Tensor of any shape and floating dtype; anything else is returned as it is.

    Returns:
        A tensor of ones of the shape and dtype of `x`, differentiable to any order.

    Source: Foerster et al., "DiCE: The Infinitely Differentiable Monte Carlo Estimator", ICML 2018.
    """
    return torch.exp(x - x.detach()) if isinstance(x, Tensor) else x


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


def _refresh_flat_weights(module: nn.Module) -> None:
    """Make an RNN use the tensors that its `_parameters` hold now."""
    if isinstance(module, nn.RNNBase):
        # The part of RNNBase._apply that matters; the rest reads .grad of non-leaf tensors.
        module._init_flat_weights()
    else:
        module._apply(_identity)


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
        _refresh_flat_weights(clone)
    return clone


class ParameterSlots:
    """The parameters of a module and every place that holds one, found in one walk.

    `params` are those of `module.parameters()`, in its order. `put` exchanges them, keeps ties,
    and refreshes what RNNs derive from them.

    Args:
        module: the module to look through.
    """

    __slots__ = ("_buffers", "_flattened", "_places", "params")

    def __init__(self, module: nn.Module) -> None:
        self.params: list[Tensor] = []
        self._places: list[tuple[dict[str, Any], str, int]] = []
        self._buffers: list[tuple[dict[str, Any], str]] = []
        self._flattened: list[nn.Module] = []
        index: dict[int, int] = {}
        seen: set[int] = set()
        stack: list[nn.Module] = [module]
        while stack:
            current = stack.pop()
            if id(current) in seen:
                continue
            seen.add(id(current))
            state = current.__dict__
            params = state["_parameters"]
            for key, param in params.items():
                if param is not None:
                    k = index.setdefault(id(param), len(self.params))
                    if k == len(self.params):
                        self.params.append(param)
                    self._places.append((params, key, k))
            buffers = state["_buffers"]
            for key, buffer in buffers.items():
                if buffer is not None and buffer.requires_grad:
                    self._buffers.append((buffers, key))
            children = state["_modules"]
            if children:
                stack.extend([c for c in reversed(children.values()) if c is not None])
            if hasattr(type(current), "flatten_parameters") or "flatten_parameters" in state:
                self._flattened.append(current)

    def put(self, new: list[Tensor]) -> None:
        """Exchange the parameters.

        Args:
            new: one tensor for each of `params`; the same one where nothing changes.
        """
        for holder, key, k in self._places:
            holder[key] = new[k]
        if self._buffers:  # a buffer may be tied to a parameter
            by_id = {id(old): tensor for old, tensor in zip(self.params, new, strict=True)}
            for holder, key in self._buffers:
                holder[key] = by_id.get(id(holder[key]), holder[key])
        self.params = list(new)
        for current in reversed(self._flattened):  # children before parents
            _refresh_flat_weights(current)


def replace_parameters(module: nn.Module, replacements: Mapping[int, Tensor]) -> None:
    """Swap parameters of a module and its submodules for others, in place and keeping ties.

    Args:
        module: Module to change.
        replacements: `id(old tensor)` -> new tensor. Tensors not named stay.
    """
    slots = ParameterSlots(module)
    slots.put([replacements.get(id(p), p) for p in slots.params])


def _owned_tensors(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """List the parameters, in the order of `module.parameters()`, and the buffers, once each."""
    params: dict[int, Tensor] = {}
    buffers: dict[int, Tensor] = {}
    seen = set()
    stack: list[nn.Module] = [module]
    while stack:
        current = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for param in current._parameters.values():
            if param is not None:
                params[id(param)] = param
        for buffer in current._buffers.values():
            if buffer is not None:
                buffers[id(buffer)] = buffer
        if current._modules:
            stack.extend(c for c in reversed(current._modules.values()) if c is not None)
    return list(params.values()), list(buffers.values())


def _check_update(update: Any, tensor: Tensor, module: nn.Module) -> None:
    """Raise unless `tensor + update` has the shape, dtype and device of `tensor`."""
    error: type[Exception] = ValueError
    if not isinstance(update, Tensor):
        error = TypeError
        problem = f"a Tensor or None, got {type(update).__name__}"
    elif update.shape != tensor.shape:
        problem = f"shape {tuple(tensor.shape)}, got {tuple(update.shape)}"
    elif update.device != tensor.device:
        problem = f"device {tensor.device}, got {update.device}"
    elif (
        update.dtype != tensor.dtype
        # A lower precision is welcome (autocast makes such updates): the sum keeps its dtype.
        and torch.promote_types(update.dtype, tensor.dtype) != tensor.dtype
    ):
        problem = f"dtype {tensor.dtype}, got {update.dtype}"
    else:
        return
    owned = (*module.named_parameters(), *module.named_buffers())
    name = next(name for name, other in owned if other is tensor)
    raise error(f"updates: expected for {name!r} {problem}")


def _align_updates(params: list[Tensor], updates: Iterable[Tensor | None]) -> dict[int, Any]:
    """Pair parameters with updates: `id(parameter)` -> update or None."""
    if isinstance(updates, (Tensor, Mapping, str)) or not isinstance(updates, Iterable):
        raise TypeError(
            "updates: expected a list with one Tensor or None for each parameter, "
            f"got {type(updates).__name__}"
        )
    updates = list(updates)
    if len(updates) != len(params):
        raise ValueError(
            f"updates: expected {len(params)} entries, one for each parameter, got {len(updates)}"
        )
    return {id(p): u for p, u in zip(params, updates, strict=True)}


def update_module(
    module: _ModuleT,
    updates: Iterable[Tensor | None] | None = None,
    memo: dict[Tensor, Tensor] | None = None,
) -> _ModuleT:
    """Add an update to each parameter, differentiably: p <- p + u.

    The tensors in the module are exchanged, never written to, and the module is unchanged if an
    error is raised. Without `updates`, the attribute `.update` of every parameter and buffer is
    used, where it is set and not None, and then set to None.

    Args:
        module: Module to update, in place.
        updates: One tensor of its parameter's shape, or None for no change, for each parameter in
            the order of `module.parameters()`. It takes precedence over `.update` attributes.
        memo: Old tensor -> updated tensor, read and filled, to keep ties across several calls.

    Returns:
        The module itself.

    Raises:
        TypeError: If `module` is no module, or an update is neither a tensor nor None.
        ValueError: If there are too few or too many updates, or one has the wrong shape, a dtype
            that would change its parameter's, or the wrong device.

    Source: learn2learn 0.2.0, `utils.update_module`.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    params, buffers = _owned_tensors(module)
    given = {} if updates is None else _align_updates(params, updates)

    stale: list[Tensor] = []
    updated: dict[Tensor, Tensor] = {} if memo is None else dict(memo)
    for tensor in (*params, *buffers):
        update = getattr(tensor, "update", None)
        if update is not None:
            stale.append(tensor)
        if given:
            update = given.get(id(tensor), update)
        if update is not None and tensor not in updated:
            _check_update(update, tensor, module)
            updated[tensor] = tensor + update

    # Nothing can fail from here on.
    for tensor in stale:
        tensor.update = None  # type: ignore[attr-defined]
    replace_parameters(module, {id(old): new for old, new in updated.items()})
    if memo is not None:
        memo.update(updated)
    return module


def detach_module(module: Any, keep_requires_grad: bool = False) -> None:
    """Cut a cloned module out of its graph, in place.

    Args:
        module: Module whose parameters and buffers are detached. Anything else is ignored.
        keep_requires_grad: Whether tensors that required a gradient go on requiring one, as
            leaves. By default none does afterwards.
    """
    if not isinstance(module, nn.Module):
        return
    replacements: dict[int, Tensor] = {}
    keep_alive = []  # so that no id in `replacements` is given to another tensor
    params, buffers = _owned_tensors(module)
    for tensor in (*params, *buffers):
        requires_grad = tensor.requires_grad
        if tensor._is_view() and requires_grad:
            # A view cannot be detached in place; the module gets another tensor on its memory.
            keep_alive.append(tensor)
            detached = tensor.detach()
            replacements[id(tensor)] = detached
        elif requires_grad or isinstance(tensor, nn.Parameter):
            detached = tensor.detach_()
        else:
            continue
        if keep_requires_grad and requires_grad:
            detached.requires_grad_()
    if replacements:
        replace_parameters(module, replacements)


def _clone_value(value: Any, memo: dict[int, Any]) -> Any:
    """Copy what a distribution holds: graph tensors by clone(), the rest by deepcopy()."""
    if id(value) in memo:
        return memo[id(value)]
    result: Any
    if isinstance(value, Tensor):
        result = value.clone() if value.requires_grad else copy.deepcopy(value)
    elif isinstance(value, nn.Module):
        result = clone_module(value)
    elif isinstance(value, (Distribution, Transform)):
        result = copy.copy(value)
        for key, item in value.__dict__.items():
            result.__dict__[key] = _clone_value(item, memo)
    elif type(value) in (list, tuple):
        result = type(value)([_clone_value(item, memo) for item in value])
    elif type(value) is dict:
        result = {key: _clone_value(item, memo) for key, item in value.items()}
    else:
        result = copy.deepcopy(value)
    memo[id(value)] = result
    return result


def clone_distribution(dist: _T) -> _T:
    """Copy a distribution so that its parameters are differentiable clones.

    Args:
        dist: A `torch.distributions.Distribution`, nested ones included.

    Returns:
        The copy; tensors that require a gradient are in the graph of the original's.
    """
    result: _T = _clone_value(dist, {})
    return result


def _detach_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if isinstance(value, nn.Module):
        detach_module(value)
    elif isinstance(value, (Distribution, Transform)):
        for key, item in value.__dict__.items():
            value.__dict__[key] = _detach_value(item)
    elif type(value) in (list, tuple):
        return type(value)([_detach_value(item) for item in value])
    return value


def detach_distribution(dist: _T) -> _T:
    """Cut a distribution out of its graph, in place.

    Args:
        dist: A `torch.distributions.Distribution`, nested ones included.

    Returns:
        The distribution itself.
    """
    result: _T = _detach_value(dist)
    return result


def accuracy(preds: Tensor, targets: Tensor) -> Tensor:
    """Compute the share of samples whose highest score is that of the target.

    Args:
        preds: Scores, `[N, C, ...]`.
        targets: Classes, `[N, ...]`, of any real dtype.

    Returns:
        The number of hits divided by N, a float32 scalar.
    """
    hits = (preds.argmax(dim=1).long() == targets.long()).sum().float()
    return hits / preds.size(0)


def flatten_config(args: Any, prefix: str | None = None) -> dict[str, Any]:
    """Flatten nested dictionaries, dataclasses and namespaces into one dictionary.

    Args:
        args: A dict with string keys, a dataclass instance or an `argparse.Namespace`, nested in
            any way.
        prefix: What to put before every key, followed by a dot.

    Returns:
        Leaf values by dotted key, e.g. `{"model.hidden": 32}`.

    Raises:
        TypeError: If `args` is none of the three, or a key is not a string.
        ValueError: If two leaves get the same dotted key.
    """
    items = _config_items(args)
    if items is None:
        if prefix is None:
            raise TypeError(
                "args: expected a dict, a dataclass instance or an argparse.Namespace, "
                f"got {type(args).__name__}"
            )
        return {prefix: args}
    flat: dict[str, Any] = {}
    for key, value in items.items():
        if not isinstance(key, str):
            raise TypeError(f"args: expected string keys, got {key!r} ({type(key).__name__})")
        child = flatten_config(value, key if prefix is None else f"{prefix}.{key}")
        twice = flat.keys() & child.keys()
        if twice:
            raise ValueError(f"args: expected distinct dotted keys, got {sorted(twice)} twice")
        flat.update(child)
    return flat


def _config_items(args: Any) -> Mapping[Any, Any] | None:
    if isinstance(args, argparse.Namespace):
        return vars(args)
    if isinstance(args, Mapping):
        return args
    if dataclasses.is_dataclass(args) and not isinstance(args, type):
        return {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    return None


class _SingleWarning:
    """Give each message at most one warning in the life of the process."""

    def __init__(self) -> None:
        self.warned_messages: list[str] = []
        self.warning_categories: dict[str, type[Warning]] = {
            "default": UserWarning,
            "deprecation": DeprecationWarning,
        }

    def __call__(self, message: str, severity: str | type[Warning] | None = None) -> None:
        """Warn unless the same message was given before.

        Args:
            message: The text.
            severity: "default" (also None), "deprecation", a Warning class, or "error".

        Raises:
            RuntimeError: With the message, if `severity` is "error".
            ValueError: If `severity` is another string.
        """
        if message in self.warned_messages:
            return
        if severity == "error":
            raise RuntimeError(message)
        category = severity or "default"
        if isinstance(category, str):
            if category not in self.warning_categories:
                expected = [*self.warning_categories, "error"]
                raise ValueError(f"severity: expected one of {expected}, got {severity!r}")
            category = self.warning_categories[category]
        warnings.warn(message, category=category, stacklevel=2)
        self.warned_messages.append(message)


warn_once = _SingleWarning()
