"""Vector-Jacobian products and sums of what a backward pass carries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastkfo.inner_loop.run import Run


def pulled(
    outputs: Sequence[Any],
    cotangents: Sequence[Any],
    inputs: Sequence[Any],
    differentiable: bool = False,
) -> list[Any]:
    """Vector-Jacobian products; None for an input that nothing depends on or that wants none."""
    pairs = [
        (x, c)
        for x, c in zip(outputs, cotangents, strict=True)
        if x is not None and c is not None and x.requires_grad
    ]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad(
            [x for x, _ in pairs],
            wanted,
            [c for _, c in pairs],
            create_graph=differentiable,
            allow_unused=True,
        )
    )
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]


def added(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    """Sums, None counting as zero."""
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


def check_differentiated_once(option: str) -> None:
    """Raise if a graph of the backward pass is asked for: there is none to be had."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{option}: expected memory='full' without chunks where the meta-gradient is "
            "differentiated again (create_graph=True); what is computed again can be once"
        )


@contextmanager
def repeating(run: Run) -> Iterator[None]:
    """Within this, no running statistic moves: it has moved already."""
    for buffers in run.buffers:
        buffers.recording = False
    try:
        yield
    finally:
        for buffers in run.buffers:
            buffers.recording = True
