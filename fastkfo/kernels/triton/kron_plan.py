"""How an item of the Kronecker ops is spread over programs, and whether it is for the kernels.

A matrix whose sides, or whose elements with those that pad it, exceed the op's tile goes by the
formula instead (`kron_formula.py`), whose products are cuBLAS's or rocBLAS's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from fastkfo.kernels.triton import launch
from fastkfo.kernels.triton.kron_item import BIAS, LEFT, RIGHT, SCALE, Item
from fastkfo.kernels.triton.launch import Tile

# The elements of a tile, the largest n and the largest m, by platform, bits of the arithmetic and
# op. Not measured on any GPU: the largest whose registers do not spill. Three tf32 products keep
# two parts of each operand there.
_TILES = {
    ("cuda", 32): {
        "kron_forward": Tile(2048, 64, 64, 8, 1),
        "kron_backward": Tile(1024, 64, 64, 4, 1),
        "kron_double_backward": Tile(512, 32, 32, 8, 1),
    },
    ("cuda", 64): {
        "kron_forward": Tile(1024, 64, 64, 8, 1),
        "kron_backward": Tile(1024, 64, 64, 8, 1),
        "kron_double_backward": Tile(512, 32, 32, 8, 1),
    },
    ("hip", 32): {
        "kron_forward": Tile(2048, 64, 64, 8, 1),
        "kron_backward": Tile(2048, 64, 64, 8, 1),
        "kron_double_backward": Tile(1024, 64, 32, 8, 1),
    },
    ("hip", 64): {
        "kron_forward": Tile(2048, 64, 64, 8, 1),
        "kron_backward": Tile(2048, 64, 64, 8, 1),
        "kron_double_backward": Tile(512, 32, 32, 8, 1),
    },
}
_BATCH = 2**30  # entries of a task that 32 bits count, with room for the last tile


class Plan(NamedTuple):
    """How an item is spread over programs; B, n, m as a kernel sees them."""

    sizes: tuple[int, int, int]
    tile: launch.Tile
    chunks: int
    products: bool  # whether it multiplies matrices
    constants: dict[str, Any]

    def run(self, kernel: Any, item: Item, *arguments: Any, **constants: Any) -> None:
        """Start a kernel: its own arguments, then the chunks and the sizes."""
        launch.run(
            kernel, (self.chunks * item.dims[0], 1, 1), self.tile, *arguments, self.chunks,
            *self.sizes, FULL=item.full, **self.constants, **constants,
        )  # fmt: skip


def plan_of(op: str, item: Item) -> Plan | None:
    """The plan of an item for an op; None if it is too large for the kernels.

    Args:
        op: "kron_forward", "kron_backward" or "kron_double_backward".
        item: with none of T, B, n, m zero.

    Returns:
        The plan.
    """
    _, batch, n, m = item.dims
    left, right = item.present("left", "d_left"), item.present("right", "d_right")
    if not left and not item.present("bias", "d_bias"):  # rows are alike: more of a batch
        batch, n = batch * n, 1
        if not right:
            batch, m = batch * m, 1
    rows, columns = _padded(n, left), _padded(m, right)
    # tl.dot takes no side below 16: of the rows times the columns of a block, and vice versa.
    least = max(1, 16 // columns if left and n > 1 else 1, 16 // rows if right and m > 1 else 1)
    dtype = item.given["grads"].dtype
    tile = _TILES[launch.platform(), 64 if dtype == torch.float64 else 32][op]
    if n > tile.columns or m > tile.depth or rows * columns * least > tile.rows or batch > _BATCH:
        return None
    room = tile.rows // (rows * columns)
    block = max(least, min(room, triton.next_power_of_2(batch)))
    sums = item.wanted & (LEFT | RIGHT | BIAS) or (item.wanted & SCALE and not item.full)
    steps, chunks = launch.steps(batch, item.dims[0], block, most=None if sums else 2**20)
    constants = {
        "STEPS": steps, "PRECISION": launch.precision(launch.accumulator(dtype), "matmul"),
        "ACC": launch.in_kernel(dtype), "N": rows, "M": columns, "BLOCK_B": block,
    }  # fmt: skip
    return Plan((batch, n, m), tile, chunks, (left and n > 1) or (right and m > 1), constants)


def _padded(size: int, product: bool) -> int:
    """A side of a tile: a power of two; at least 16, if there is a product of matrices, or one."""
    return 1 if size == 1 else max(16 if product else 1, triton.next_power_of_2(size))
