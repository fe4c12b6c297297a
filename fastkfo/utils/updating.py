"""Exchanging the parameters of modules, differentiably and keeping ties; detaching them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastkfo.utils.cloning import refresh_flat_weights

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


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
        """Exchange the parameters; a buffer that is tied to one follows it.

        Args:
            new: one tensor for each of `params`; the same one where nothing changes.
        """
        for holder, key, k in self._places:
            holder[key] = new[k]
        if self._buffers:
            by_id = {id(old): tensor for old, tensor in zip(self.params, new, strict=True)}
            for holder, key in self._buffers:
                holder[key] = by_id.get(id(holder[key]), holder[key])
        self.params = list(new)
        for current in reversed(self._flattened):  # children before parents
            refresh_flat_weights(current)


def replace_parameters(module: nn.Module, replacements: Mapping[int, Tensor]) -> None:
    """Swap tensors of a module and its submodules for others, in place and keeping ties.

    Args:
        module: Module to change.
        replacements: `id(old tensor)` -> new tensor, for parameters and buffers. Tensors not named
            stay.
    """
    slots = ParameterSlots(module)
    # Found before anything moves, so that no replacement is replaced in turn (a -> b, b -> c).
    buffers = [
        (m._buffers, key, replacements[id(buffer)])
        for m in module.modules()
        for key, buffer in m._buffers.items()
        if id(buffer) in replacements
    ]
    slots.put([replacements.get(id(p), p) for p in slots.params])
    for holder, key, new in buffers:
        holder[key] = new


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

    The state of an inner optimizer, where the module is a learner with one, is cut as well. Where
    it is a clone, its `lr` is its learner's, which stays as it is: the clone goes on with a copy
    (of a Parameter, or of a `PerStepLR`).

    Args:
        module: Module whose parameters and buffers are detached. Anything else is ignored.
        keep_requires_grad: Whether tensors that required a gradient go on requiring one, as
            leaves. By default none does afterwards.
    """
    if not isinstance(module, nn.Module):
        return
    for part in list(module.modules()):
        let_go = getattr(type(part), "_let_go", None)  # of a learner: what it carries beside these
        if let_go is not None:
            let_go(part, keep_requires_grad)
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
