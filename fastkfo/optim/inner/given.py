"""The check of an optimizer that is given to a learner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastkfo.optim.inner.adam import Adam
from fastkfo.optim.inner.optimizer import InnerOptimizer
from fastkfo.optim.inner.rmsprop import RMSProp
from fastkfo.optim.inner.sgd import SGD

_KNOWN = (SGD, Adam, RMSProp)  # have numbers alone


def check_optimizer(name: str, optimizer: object) -> None:
    """Raise TypeError unless `optimizer` is None or an InnerOptimizer that has nothing to learn."""
    if optimizer is None or type(optimizer) in _KNOWN:
        return
    if not isinstance(optimizer, InnerOptimizer):
        raise TypeError(
            f"{name}: expected None or an InnerOptimizer (fastkfo.optim.inner has SGD(), "
            f"Adam() and RMSProp()), got {_kind(optimizer)}"
        )
    kind = type(optimizer).__name__
    # What it learned would be no leaf of the learner's: memory modes would give it no gradient.
    fixed = "whose numbers are fixed (learning rates alone are learned, by lr or a PerStepLR)"
    if isinstance(optimizer, nn.Module):
        raise TypeError(f"{name}: expected one {fixed}, got {kind}, a torch.nn.Module")
    for attribute, value in _attributes(optimizer):
        if any(_learned(value)):
            raise TypeError(
                f"{name}: expected one {fixed}, got {kind}, whose {attribute!r} requires a gradient"
            )


def _kind(optimizer: object) -> str:
    """What came in place of an InnerOptimizer."""
    if isinstance(optimizer, type):
        return f"the class {optimizer.__name__}"
    kind = type(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        return kind.__name__
    package = "torch.optim" if kind.__module__.startswith("torch.optim.") else kind.__module__
    return f"{package}.{kind.__name__}, an outer optimizer"


def _attributes(optimizer: InnerOptimizer) -> Iterator[tuple[str, Any]]:
    """An optimizer's own attributes, and those of its classes."""
    yield from getattr(optimizer, "__dict__", {}).items()
    for kind in type(optimizer).__mro__:
        if kind is InnerOptimizer:
            return
        for name, value in vars(kind).items():
            # What is in a slot is the optimizer's own.
            slot = type(value).__name__ == "member_descriptor"
            yield name, getattr(optimizer, name, None) if slot else value


def _learned(value: Any) -> Iterator[bool]:
    """Whether a tensor requires a gradient: the value, or those in it."""
    if isinstance(value, Tensor):
        yield value.requires_grad
    elif isinstance(value, nn.Module):
        yield from [p.requires_grad for p in value.parameters()]
    elif isinstance(value, dict):
        for x in value.values():
            yield from _learned(x)
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from _learned(x)
