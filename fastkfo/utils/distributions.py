"""Cloning and detaching probability distributions, for meta-learned policies."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from fastkfo.utils.cloning import clone_module
from fastkfo.utils.updating import detach_module

_T = TypeVar("_T")


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
