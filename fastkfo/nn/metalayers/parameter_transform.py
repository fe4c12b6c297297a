"""Calls a module with transformed parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from fastkfo.utils.cloning import refresh_flat_weights

__all__ = ["ParameterTransform"]


class ParameterTransform(nn.Module):
    """Call a module with p replaced by f_p(p), for each of its parameters.

    The original parameters are back after the call, also when it raises. Useful for constrained or
    low-rank changes of weights, best inside a MetaModule.

    Args:
        module: The module to wrap. Parameters of its submodules are transformed too.
        transform: Called with each parameter once; returns f_p, a module (often a learned one)
            from the parameter to what takes its place.

    Attributes:
        parameter_transforms: The f_p by parameter name, with "/" for each "." of the name. Tied
            parameters have one f_p, under the first name.

    Raises:
        TypeError: If `module` is no module, `transform` is not callable or returns no module.

    Source: learn2learn 0.2.0, `nn.metalayers.ParameterTransform`.
    """

    def __init__(self, module: nn.Module, transform: Callable[[Tensor], nn.Module]) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
        if not callable(transform):
            raise TypeError(f"transform: expected a callable, got {type(transform).__name__}")
        transforms: dict[str, nn.Module] = {}
        self._parameter_names: list[str] = []
        for name, param in module.named_parameters():
            result = transform(param)
            if not isinstance(result, nn.Module):
                raise TypeError(
                    f"transform: expected it to return a torch.nn.Module for {name!r}, "
                    f"got {type(result).__name__}"
                )
            transforms[_key(name)] = result
            self._parameter_names.append(name)
        # Every name of a tied parameter: all of its places get the same new tensor.
        self._aliases: dict[str, list[str]] = {}
        first_names = {id(p): name for name, p in module.named_parameters()}
        for name, param in module.named_parameters(remove_duplicate=False):
            self._aliases.setdefault(first_names[id(param)], []).append(name)
        # The order of these three is that of learn2learn's state dict.
        self.module = module
        self.transform = transform
        self.parameter_transforms = nn.ModuleDict(transforms)

    def _slot(self, name: str) -> tuple[dict[str, Any], str]:
        """Find the dictionary that holds a parameter of the module, and its key in there."""
        path, _, key = name.rpartition(".")
        owner = self.module.get_submodule(path)
        # A replica made by DataParallel holds its parameters as plain attributes.
        return (owner._parameters if key in owner._parameters else owner.__dict__), key

    def _refresh(self) -> None:
        for submodule in self.module.modules():
            if hasattr(submodule, "flatten_parameters"):
                refresh_flat_weights(submodule)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with its parameters transformed.

        Args:
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            What it returns.
        """
        changed: list[tuple[dict[str, Any], str, Tensor]] = []
        try:
            for name in self._parameter_names:
                table, key = self._slot(name)
                new = self.parameter_transforms[_key(name)](table[key])
                for alias in self._aliases[name]:
                    table, key = self._slot(alias)
                    changed.append((table, key, table[key]))
                    table[key] = new
            self._refresh()
            return self.module(*args, **kwargs)
        finally:
            for table, key, original in reversed(changed):
                table[key] = original
            self._refresh()

    def meta_parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters of the f_p.

        Yields:
            Parameters.
        """
        for transform in self.parameter_transforms.values():
            yield from transform.parameters()


def _key(name: str) -> str:
    """Turn a parameter's name into a key that nn.ModuleDict takes; plain names are kept."""
    return name.replace(".", "/")
