"""The vmap form of ops with a task axis: the mapped axis becomes more tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastkfo.functional.function import batched_first


def folded(function: Any, info: Any, in_dims: Sequence[Any], args: Sequence[Any]) -> Any:
    """Apply a Function whose tensors all have the task axis in front, mapped once more.

    Args:
        function: the autograd Function.
        info: of vmap.
        in_dims: of vmap; None for what is no tensor or is not mapped.
        args: of the Function.

    Returns:
        What a `vmap` staticmethod returns: outputs and where their mapped axis is.
    """
    size = info.batch_size
    flat = [
        batched_first(x, d, size).flatten(0, 1) if isinstance(x, Tensor) else x
        for x, d in zip(args, in_dims, strict=True)
    ]
    out = function.apply(*flat)
    if isinstance(out, Tensor):
        return out.unflatten(0, (size, -1)), 0
    parts = [None if x is None else x.unflatten(0, (size, -1)) for x in out]
    return tuple(parts), tuple([None if x is None else 0 for x in out])
