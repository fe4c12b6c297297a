"""The raw ops of the Kronecker update and of squared factors: which implementation runs them.

csrc/library.cpp has the schemas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOW = (torch.bfloat16, torch.float16)
# Beyond LARGE a product fills a GPU by itself. A block takes one unit, a chunk of a task's batch
# (`chunk_of` in csrc/cuda/kron.cuh): of more than HEAVY multiplications, there must be MANY.
LARGE, HEAVY, MANY = 256, 1 << 20, 128


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
    return in_float32(op, *args) if first.dtype in LOW else op(*args, _tf32_is_allowed())


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


def _tf32_is_allowed() -> bool:
    """PyTorch's switch for products of matrices; its older name raises where both are used."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# Dynamo cannot trace the switch; it makes a guard of it, so that this is no constant for good.
_tf32_is_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def for_blas(tasks: int, batch: int, n: int, m: int, factors: bool) -> bool:
    """Whether an item is left to the formula on a GPU, and so to cuBLAS.

    Args:
        tasks: T, the number of tasks.
        batch: B, the size of the batch.
        n: rows of the gradient.
        m: columns of the gradient.
        factors: whether it has any.

    Returns:
        Whether it is.
    """
    if not factors or max(n, m) > LARGE:
        return True
    chunk = max(1, 64 // max(1, m), n // max(1, m), m // max(1, n))
    units = tasks * -(-batch // chunk)
    return n * m * min(batch, chunk) * (n + m) > HEAVY and units < MANY


def gram_for_blas(count: int, rows: int, n: int) -> bool:
    """The same of `LᵀL`, for `count` factors [rows, n]."""
    return max(rows, n) > LARGE or (rows * n * 64 > HEAVY and count * -(-n // 64) < MANY)
