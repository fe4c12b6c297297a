"""Replaces the submodules of a model by others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

__all__ = ["MetaModule"]


class MetaModule(nn.Module):
    """Wrap a model and replace its submodules, by class.

    The model is changed in place: every submodule (the model itself included) whose exact class
    is a key of `substitutions` becomes `substitutions[class](submodule)`. A submodule used in
    several places is replaced once and stays shared.

    Args:
        module: The model to wrap.
        substitutions: Class -> function from a submodule to its replacement, which usually
            contains it.
        freeze_module: Whether the model's own parameters stop requiring a gradient, so that only
            those made by the substitutions are learned.

    Attributes:
        wrapped_module: The model with the replacements.

    Raises:
        TypeError: If `module` is no module, `substitutions` is no mapping from classes to
            callables, or a substitution returns no module.

    Source: learn2learn 0.2.0, `nn.metalayers.MetaModule`.
    """

    def __init__(
        self,
        module: nn.Module,
        substitutions: Mapping[type, Callable[[Any], nn.Module]],
        freeze_module: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
        if not isinstance(substitutions, Mapping):
            raise TypeError(
                f"substitutions: expected a mapping, got {type(substitutions).__name__}"
            )
        for key, value in substitutions.items():
            if not isinstance(key, type) or not callable(value):
                raise TypeError(
                    f"substitutions: expected classes mapped to callables, got {key!r}: {value!r}"
                )
        self.substitutions = substitutions
        self.freeze_module = freeze_module
        # (path of a replacement, path of the original from there, the original if it is not in
        # there), parents first. Paths, because they hold in a clone too.
        self._replaced: list[tuple[str, str | None, nn.Module | None]] = []
        self.wrapped_module = self._wrap(module, "wrapped_module", {})

    def _wrap(self, module: nn.Module, path: str, memo: dict[nn.Module, nn.Module]) -> nn.Module:
        if module in memo:
            if memo[module] is not module:
                self._record(module, memo[module], path)
            return memo[module]

        new, holder, inner = module, module, ""
        if type(module) in self.substitutions:
            new = self.substitutions[type(module)](module)
            if not isinstance(new, nn.Module):
                raise TypeError(
                    f"substitutions: expected the one for {type(module).__name__} to return a "
                    f"torch.nn.Module, got {type(new).__name__}"
                )
            found = self._record(module, new, path)
            if found is None:
                holder = new  # it may have taken over the children of the original
            else:
                inner = found
        memo[module] = new

        prefix = f"{path}.{inner}" if inner else path
        for name, child in list(module._modules.items()):
            if child is not None and holder._modules.get(name) is child:
                holder._modules[name] = self._wrap(child, f"{prefix}.{name}", memo)

        if self.freeze_module:
            for p in module._parameters.values():
                if p is not None:
                    p.requires_grad_(False)
        return new

    def _record(self, module: nn.Module, new: nn.Module, path: str) -> str | None:
        """Remember a replacement; return where in it the original is, None if nowhere."""
        inner = next((name for name, sub in new.named_modules() if sub is module), None)
        if new is not module:
            self._replaced.append((path, inner, module if inner is None else None))
        return inner

    def meta_parameters(self, module: nn.Module | None = None) -> Iterator[nn.Parameter]:
        """Iterate over what the submodules themselves call their `meta_parameters()`, once each.

        Args:
            module: Where to look; None for the wrapped model.

        Yields:
            Parameters.
        """
        seen = set()
        for submodule in (self.wrapped_module if module is None else module).modules():
            own: Any = getattr(submodule, "meta_parameters", None)
            if own is not None:
                for p in own():
                    if id(p) not in seen:
                        seen.add(id(p))
                        yield p

    def module(self) -> nn.Module:
        """Take every replacement out again, in place.

        Afterwards this MetaModule computes what the original model does.

        Returns:
            The original model.
        """
        for path, inner, original in reversed(self._replaced):  # children before parents
            if original is None:
                original = self.get_submodule(f"{path}.{inner}" if inner else path)
            parent, _, name = path.rpartition(".")
            self.get_submodule(parent)._modules[name] = original
        self._replaced = []
        return self.wrapped_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped model."""
        return self.wrapped_module(*args, **kwargs)
