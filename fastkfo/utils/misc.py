"""Small helpers of learn2learn."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def magic_box(x: Any) -> Any:
    """Evaluate to 1 with the gradient of `x`: exp(x - stop_gradient(x)).

    Args:
        x: Tensor of any shape and floating dtype; anything else is returned as it is.

    Returns:
        A tensor of ones of the shape and dtype of `x`, differentiable to any order.

    Source: Foerster et al., "DiCE: The Infinitely Differentiable Monte Carlo Estimator", ICML 2018.
    """
    return torch.exp(x - x.detach()) if isinstance(x, Tensor) else x


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
