"""What the autograd Functions of all ops share."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch.autograd import Function

_T = TypeVar("_T")


def with_eager_form(function: type[Function]) -> type[Function]:
    """Give a Function with `setup_context` and `vmap` the old-style form as `.eager`.

    The new style is needed under functorch's transforms; outside them the old one costs less than
    half as much per call.

    Args:
        function: the Function, in the new style.

    Returns:
        The same class.
    """
    new_style: Any = function

    class Eager(Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = new_style.forward(*args)
            new_style.setup_context(ctx, args, output)
            return output

        backward = function.backward

    Eager.__name__ = Eager.__qualname__ = function.__name__
    # Function.apply, less the look for functorch's wrappers that `apply` below has done.
    new_style.eager = super(Function, Eager).apply
    return function


def cached(function: Callable[..., _T]) -> Callable[..., _T]:
    """Remember results by arguments; while torch.compile traces, which frowns on it, do not."""
    remembered = lru_cache(maxsize=4096)(function)

    @wraps(function)
    def call(*args: Any) -> _T:
        return function(*args) if torch.compiler.is_compiling() else remembered(*args)

    return call


def apply(function: Any, *args: Any) -> Any:
    """Apply the form of a Function that the surroundings need."""
    if torch.compiler.is_compiling():
        if not _differentiated(args):
            return function.forward(*args)  # Dynamo would pass a ctx to a forward of any arity
        return function.apply(*_distinct(args))
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return function.eager(*args)


def _differentiated(args: Any) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in args
    )


def differentiated(*tensors: torch.Tensor | None) -> bool:
    """Whether what is computed of these may be differentiated once more."""
    if not torch.is_grad_enabled():
        return False
    if torch._C._are_functorch_transforms_active():  # at some level or other
        return True
    return any([x is not None and x.requires_grad for x in tensors])


def _distinct(args: Any) -> list[Any]:
    """The arguments as Dynamo takes them: no tensor twice."""
    out: list[Any] = []
    for x in args:
        twice = isinstance(x, torch.Tensor) and any(x is y for y in out)
        out.append(x.view_as(x) if twice else x)
    return out


def batched_first(x: torch.Tensor, in_dim: int | None, size: int) -> torch.Tensor:
    """A vmapped operand with the mapped axis in front, whether or not it had one."""
    return x.expand(size, *x.shape) if in_dim is None else x.movedim(in_dim, 0)
