"""The raw ops of convolutional layers: which implementation runs them, and in which precision.

Images are `[T, N, H, W, C]` here, channels last and without gaps; csrc/library.cpp has the schemas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOW = (torch.bfloat16, torch.float16)


def run(implementation: str, name: str, *args: Any) -> Any:
    """Call a raw op.

    The native kernels have float32 and float64. What is in lower precision goes through them in
    float32, and comes back in float32: statistics and parameters stay in it, images are narrowed
    by the caller.

    Args:
        implementation: "native" or "triton".
        name: of the op.
        args: of the op.

    Returns:
        What the op returns.
    """
    if implementation == "triton":
        from fastkfo.kernels import triton

        return getattr(triton, name)(*args)
    widened = [x.float() if isinstance(x, Tensor) and x.dtype in LOW else x for x in args]
    return getattr(torch.ops.fastkfo, name).default(*widened)


def channels_last(x: Tensor) -> Tensor:
    """`[T, N, C, H, W]` as `[T, N, H, W, C]`: a view, without gaps if x lies channels last."""
    return x.permute(0, 1, 3, 4, 2)


def channels_first(x: Tensor) -> Tensor:
    """`[T, N, H, W, C]` as `[T, N, C, H, W]`: a view."""
    return x.permute(0, 1, 4, 2, 3)


def narrowed(x: Tensor, like: Tensor) -> Tensor:
    """In the precision of another tensor."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


def parameters(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """A norm's other operands as the raw ops take them, in the precision that statistics have."""
    kind = torch.float32 if x.dtype in LOW else x.dtype
    return [None if t is None else t.to(kind).contiguous() for t in tensors]


def widened(*tensors: Tensor | None) -> list[Any]:
    """For the formula, which sums in the precision of its operands."""
    return [t.float() if isinstance(t, Tensor) and t.dtype in LOW else t for t in tensors]
