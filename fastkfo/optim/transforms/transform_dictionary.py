"""Different transforms for different parts of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


class TransformDictionary:
    """Looks a parameter's transform up; a parameter without one gets None, which is plain SGD.

    Args:
        dictionary: from a module (all its parameters) or a parameter to a transform.

    Raises:
        TypeError: a value is not callable.
        ValueError: a key is neither a module nor a parameter.
    """

    def __init__(
        self, dictionary: Mapping[nn.Module | nn.Parameter, Callable[..., nn.Module | None]]
    ) -> None:
        self.param_to_transform: dict[Tensor, Callable[..., nn.Module | None]] = {}
        for key, transform in dictionary.items():
            if not callable(transform):
                raise TypeError(
                    f"dictionary: expected callable values, got {type(transform).__name__}"
                )
            if isinstance(key, nn.Module):
                for param in key.parameters():
                    self.param_to_transform[param] = transform
            elif isinstance(key, nn.Parameter):
                self.param_to_transform[key] = transform
            else:
                raise ValueError(
                    "dictionary: expected keys that are Modules or Parameters, "
                    f"got {type(key).__name__}"
                )

    def __call__(self, param: Tensor, *args: Any, **kwargs: Any) -> nn.Module | None:
        """The transform for one parameter, or None."""
        transform = self.param_to_transform.get(param)
        return None if transform is None else transform(param, *args, **kwargs)
