"""Pytrees of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


def map_tensors(function: Callable[..., Any], *trees: Any) -> Any:
    """Map the tensors of pytrees of one structure; anything else is the first's."""
    return tree_map(lambda *x: function(*x) if isinstance(x[0], Tensor) else x[0], *trees)


def stack(trees: Sequence[Any]) -> Any:
    """One pytree from one per task; tensors are stacked, anything else is the first's."""
    flat = [tree_flatten(tree)[0] for tree in trees]
    leaves = [
        torch.stack(leaves) if isinstance(leaves[0], Tensor) else leaves[0]
        for leaves in map(list, zip(*flat, strict=True))
    ]
    return tree_unflatten(leaves, tree_flatten(trees[0])[1])
