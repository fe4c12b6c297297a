"""Draws without replacement, for many rows at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Random keys cost by the pool, insertion by the draw: that many keys cost a step of insertion.
# On a GPU a step is two launches, and keys are nearly free until there are millions.
_KEYS_PER_STEP = {"cpu": 250, "cuda": 500_000}


def distinct(
    rows: int, size: int | Tensor, draws: int, widest: int, generator: torch.Generator
) -> Tensor:
    """Draws distinct numbers from ``range(size)`` for every row, uniform over ordered subsets.

    Args:
        rows: How many independent draws, R.
        size: Of the pool: one for all, or ``[R]`` int64. At least ``draws`` each.
        draws: How many numbers, k.
        widest: The largest size.
        generator: Where all randomness comes from; its device is that of the result.

    Returns:
        ``[R, k]``, int64.
    """
    if rows * widest <= draws * _KEYS_PER_STEP.get(generator.device.type, 250):
        return by_keys(rows, size, draws, widest, generator)
    return by_insertion(rows, size, draws, generator)


def by_keys(
    rows: int, size: int | Tensor, draws: int, widest: int, generator: torch.Generator
) -> Tensor:
    """The numbers with the smallest of ``widest`` random keys, in the order of their keys."""
    device = generator.device
    # In float64 two equal keys, whose order would not be random, do not occur.
    keys = torch.rand(rows, widest, generator=generator, dtype=torch.float64, device=device)
    if isinstance(size, Tensor):
        keys.masked_fill_(torch.arange(widest, device=device) >= size[:, None], 2.0)
    return keys.topk(draws, largest=False).indices


def by_insertion(rows: int, size: int | Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Number i as its rank among those that numbers 0 to i - 1 have left, then ranks undone.

    From the last number to the first, every later one that is not below it moves up by one. This
    is one to one between ranks and ordered subsets, so uniform ranks are all that is needed.

    Returns:
        As `distinct`.
    """
    device = generator.device
    left = size - torch.arange(draws, device=device)[:, None]  # [k, 1] or [k, R]
    u = torch.rand(draws, rows, generator=generator, dtype=torch.float64, device=device)
    numbers = u.mul_(left).long()  # [k, R], number i in [0, size - i)
    # On the CPU numpy's calls, on the same memory, take half as long as torch's.
    v: Any = numbers.numpy() if device.type == "cpu" else numbers
    for i in reversed(range(draws - 1)):
        later = v[i + 1 :]
        later += later >= v[i]
    return numbers.T


def smallest(keys: Tensor, draws: int) -> Tensor:
    """``keys.argsort()[..., :draws]``, with equal keys in the order that argsort gives them.

    It looks at the keys, so it is for the CPU: where no two of the first are equal, they alone have
    to be put in order, which is several times as fast.

    Args:
        keys: ``[..., M]``.
        draws: How many, at most M.

    Returns:
        ``[..., draws]``, int64.
    """
    # One more than is asked for: the last could be equal to the first that is left out.
    values, order = keys.topk(min(draws + 1, keys.shape[-1]), largest=False)
    if bool((values.diff() == 0).any()):
        order = keys.argsort()
    return order[..., :draws]
