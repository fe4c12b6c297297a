"""The raw ops of the Kronecker update and of squared factors: which implementation runs them.

csrc/library.cpp has the schemas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOW = (torch.bfloat16, torch.float16)
# From here on a product fills a GPU by itself, and cuBLAS is faster than our kernels.
LARGE = 256


def run(implementation: str, name: str, *args: Any) -> list[Tensor]:
    """Call a raw op.

    Args:
        implementation: "native" or "triton".
        name: of the op.
        args: of the op; the first is a list of tensors, not empty.

    Returns:
        What the op returns.
    """
    if implementation == "triton":
        from fastkfo.kernels import triton

        return getattr(triton, name)(*args)
    op = getattr(torch.ops.fastkfo, name).default
    first = args[0][0]
    if not first.is_cuda:
        return op(*args)
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if first.dtype not in LOW:
        return op(*args, tf32)
    return in_float32(op, *args, tf32)


def in_float32(op: Any, *args: Any) -> list[Tensor]:
    """Call an op of operands in lower precision, which the CUDA kernels do not have.

    Args:
        op: the raw op.
        args: of the op; the first is a list of tensors, not empty.

    Returns:
        Its results, rounded to the dtype of the operands.
    """
    widened = [
        [y.float() if isinstance(y, Tensor) else y for y in x]
        if isinstance(x, (list, tuple))
        else x
        for x in args
    ]
    return [x.to(args[0][0].dtype) for x in op(*widened)]


def is_large(*sides: int) -> bool:
    """Whether products with factors of these sizes are left to the formula, and so to cuBLAS.

    On GPUs alone: the CPU's kernels are as fast as a BLAS at any size.

    Args:
        sides: n of an item's left factor, m of its right one, of those that are there.

    Returns:
        Whether one is above `LARGE`.
    """
    return max(sides, default=0) > LARGE
