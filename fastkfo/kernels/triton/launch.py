"""What the launchers share: checks, tile sizes, and the one place where a kernel is started.

The tables of tiles were measured on an H200 (bench/NOTES.md, "Triton's tiles"). To tune one, time
the op on the layers of `bench/workloads.py` for each candidate with warm caches and write the
fastest in; a candidate must still pass `tests/test_triton_compiles.py`, which refuses tiles whose
registers spill. Nothing is
tuned at a user's first call: that would take seconds, and a result that depends on the tile's
summation order would change between runs.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LIMIT = 2**31 - 2**16  # what is counted in 32 bits, with room for the last tile
_GRID_X, _GRID_YZ = 2**31 - 1, 65535  # CUDA's limits of a grid's axes
_PROGRAMS = 512  # that a long sum is split into, if it can be: about four for a multiprocessor
_SPLITS = 64  # and no more partial results than this

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Tile(NamedTuple):
    """Rows and columns of a program's output, depth of one step of its contraction."""

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 2


# The key is how products are taken. "ieee", float32 without tensor cores, keeps its operands in
# registers, hence the short steps; "tf32x3" is float32 on tensor cores, in three products of parts.
_IEEE, _DOUBLE = Tile(64, 64, 16, 4, 3), Tile(32, 32, 16, 4, 2)
_CONV = {
    # pixels x output channels
    "conv2d": {
        "ieee": _IEEE,
        "tf32x3": Tile(32, 64, 32, 4, 3),
        "tf32": Tile(128, 64, 32, 8, 3),
        "half": Tile(128, 64, 32, 8, 4),
        "double": _DOUBLE,
    },
    # pixels x input channels
    "conv2d_input": {
        "ieee": _IEEE,
        "tf32x3": Tile(128, 64, 32, 8, 3),
        "tf32": Tile(128, 64, 32, 8, 3),
        "half": Tile(128, 64, 32, 8, 4),
        "double": _DOUBLE,
    },
    # output channels x (taps and input channels); a step is `depth` pixels
    "conv2d_weight": {
        "ieee": _IEEE,
        "tf32x3": Tile(32, 64, 32, 4, 3),
        "tf32": Tile(64, 64, 32, 4, 3),
        "half": Tile(64, 64, 64, 4, 3),
        "double": _DOUBLE,
    },
}
# Of a product of factors; not measured.
_GRAM = Tile(32, 32, 32, 4, 2)
# Elements of a tile of the kernels that take no products of matrices.
_ELEMENTS = {"norm": 2048, "norm_double": 1024, "pool": 1024}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and statistics over operands of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_kernel(dtype: torch.dtype) -> Any:
    """Triton's name of `accumulator(dtype)`."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def platform() -> str:
    """Whose GPUs kernels are compiled for: PyTorch's own.

    The one place that asks; tests/triton_compile.py, which has no GPU, puts its answer here.

    Returns:
        "cuda" or "hip".
    """
    return "hip" if torch.version.hip else "cuda"


def precision(dtype: torch.dtype, products: str = "conv") -> str:
    """tl.dot's input_precision.

    float32 is taken apart into two tf32 numbers on NVIDIA's tensor cores ("tf32x3": as exact as
    float32 arithmetic, see docs/gpu.md); "tf32" only where PyTorch's switch for such products
    allows it. AMD's matrix cores multiply float32 itself.

    Args:
        dtype: of the operands.
        products: "conv" or "matmul", which have switches of their own.

    Returns:
        "ieee", "tf32x3" or "tf32".
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if dtype != torch.float32 or interpreted or platform() == "hip":
        return "ieee"
    # What allow_tf32 sets of torch.backends.cudnn (which itself raises if convolutions and RNNs
    # differ) and of torch.backends.cuda.matmul.
    backends: Any = torch.backends
    switch = backends.cudnn.conv if products == "conv" else backends.cuda.matmul
    return "tf32" if switch.fp32_precision == "tf32" else "tf32x3"


def conv_tile(op: str, dtype: torch.dtype, rows: int, columns: int) -> Tile:
    """The tile of a convolution's op for an output of `rows` x `columns` per task and group."""
    if dtype == torch.float64:
        kind = "double"
    else:
        kind = precision(dtype) if dtype == torch.float32 else "half"
    return _within(_CONV[op][kind], rows, columns)


def _within(tile: Tile, rows: int, columns: int) -> Tile:
    """No larger than the result; tl.dot takes no side below 16."""
    return tile._replace(
        rows=min(tile.rows, max(16, triton.next_power_of_2(rows))),
        columns=min(tile.columns, max(16, triton.next_power_of_2(columns))),
    )


def gram_tile(dtype: torch.dtype, rows: int, columns: int) -> Tile:
    """The tile of a product of factors `[rows, columns]`."""
    tile = _GRAM._replace(warps=8) if dtype == torch.float64 else _GRAM
    return _within(tile, rows, columns)


def plain_tile(op: str, dtype: torch.dtype, rows: int, columns: int) -> Tile:
    """The tile of an op without products of matrices; one channel block is at most 64 wide."""
    elements = _ELEMENTS[op] // (2 if dtype == torch.float64 else 1)
    width = min(64, triton.next_power_of_2(columns))
    return Tile(min(elements // width, triton.next_power_of_2(rows)), width, 1)


def steps(length: int, parallel: int, block: int, most: int | None = None) -> tuple[int, int]:
    """How a long sum is split among programs: `(tiles per program, programs)`.

    The number of tiles is a compile-time constant of the kernels (the interpreter needs that): a
    power of two keeps the number of their compilations low. It depends on sizes alone, not on the
    GPU, and so does the order of summation.

    Args:
        length: terms of the sum.
        parallel: programs that there are without a split.
        block: terms of a tile.
        most: programs that may share it, by default 64; more where no partial results are added.

    Returns:
        Tiles per program, and the number of programs that share the sum.
    """
    tiles = triton.cdiv(length, block)
    splits = min(tiles, most or _SPLITS, max(1, _PROGRAMS // max(1, parallel)))
    each = triton.next_power_of_2(triton.cdiv(tiles, splits))
    return each, triton.cdiv(tiles, each)


def check(**operands: Tensor | None) -> None:
    """Refuse what a kernel would misread.

    Args:
        operands: by name; None is skipped.

    Raises:
        TypeError: an operand's dtype.
        ValueError: an operand that is not contiguous, or on another device than the first.
    """
    given = {name: x for name, x in operands.items() if x is not None}
    device = next(iter(given.values())).device
    for name, x in given.items():
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected a dtype among {_DTYPES}, got {x.dtype}")
        if not x.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {x.stride()}")
        if x.device != device:
            raise ValueError(f"{name}: expected device {device}, got {x.device}")


def check_one_dtype(**operands: Tensor | None) -> None:
    """Refuse operands of more than one dtype.

    Args:
        operands: by name; None is skipped.

    Raises:
        TypeError: an operand's dtype is not the first one's.
    """
    given = {name: x for name, x in operands.items() if x is not None}
    dtype = next(iter(given.values())).dtype
    for name, x in given.items():
        if x.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype}, got {x.dtype}")


def check_operand(name: str, x: Tensor, like: Tensor) -> None:
    """Refuse an operand of another dtype or device than a first one; its strides may be any.

    Args:
        name: of the operand.
        x: the operand.
        like: the first one.

    Raises:
        TypeError: the dtype.
        ValueError: the device; or its memory was taken away.
    """
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected a dtype among {_DTYPES}, got {x.dtype}")
    if x.dtype != like.dtype:
        raise TypeError(f"{name}: expected dtype {like.dtype}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {x.device}")
    if x.numel() and not x.untyped_storage().nbytes():
        raise ValueError(f"{name}: expected a tensor with memory, got an empty storage")


def check_index(where: Tensor, like: Tensor) -> None:
    """Refuse positions that are not contiguous int32 on the device of what they point into.

    Args:
        where: the positions.
        like: what they point into.

    Raises:
        TypeError: another dtype.
        ValueError: strides, or the device.
    """
    if where.dtype != torch.int32:
        raise TypeError(f"where: expected int32, got {where.dtype}")
    if not where.is_contiguous() or where.device != like.device:
        raise ValueError(
            f"where: expected a contiguous tensor on {like.device}, got strides {where.stride()} "
            f"on {where.device}"
        )


def check_sizes(tasks: int, groups: int, pixels: int, image: int, weights: int = 0) -> None:
    """Refuse sizes that the kernels count in too few bits.

    Args:
        tasks: T, the number of tasks.
        groups: of a convolution; blocks of channels elsewhere.
        pixels: of all samples of a task.
        image: elements of one image of all channels.
        weights: of a convolution, of one task and group.

    Raises:
        ValueError: one of them is too large.
    """
    for name, size, limit in (
        ("tasks", tasks, _GRID_YZ),
        ("groups or blocks of channels", groups, _GRID_YZ),
        ("pixels of a task", pixels, _LIMIT),
        ("elements of an image", image, _LIMIT),
        ("weights of a task's group", weights, _LIMIT),
    ):
        if size > limit:
            raise ValueError(f"{name}: expected at most {limit} for the Triton kernels, got {size}")


def run(kernel: Any, grid: tuple[int, int, int], tile: Tile, *arguments: Any, **meta: Any) -> None:
    """Start a kernel on the device of its first tensor, and on that device's current stream.

    Args:
        kernel: the kernel.
        grid: its programs.
        tile: how they run.
        arguments: of the kernel; at least one is a tensor.
        meta: its compile-time constants.

    Raises:
        ValueError: there are more programs than CUDA counts.
    """
    if grid[0] > _GRID_X:
        raise ValueError(
            f"tiles of a task: expected at most {_GRID_X} for the Triton kernels, got {grid[0]}"
        )
    device = next(x.device for x in arguments if x is not None)
    # Triton launches on the current device, whatever its arguments' is.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, num_warps=tile.warps, num_stages=tile.stages, **meta)
