"""What `bench.kernels` times of layers: convolutions, batch norm, pools of T tasks at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.floors import Count
from bench.kernel_cases import PARTS, WIDTH, Call, Case, Draw, derivative
from fastkfo import functional

Shape = tuple[int, ...]


def conv(shape: Shape) -> Iterator[Case]:
    """A convolution of 3 × 3, its adjoint in the images, its gradient in the weights.

    Args:
        shape: T, N, C, H = W, O and the stride, as in `bench.layers`.
    """
    t, n, c, h, o, stride = shape
    side = (h - 1) // stride + 1
    flops = 2 * t * n * side**2 * o * c * 9  # padding counted as data
    numbers = t * (n * c * h * h + o * c * 9 + n * o * side**2)
    for part in ("forward", "adjoint", "weights"):

        def make(implementation: str, dtype: torch.dtype, device: str, part: str = part) -> Call:
            draw = Draw(dtype, device)
            x = images(draw, t, n, c, h).requires_grad_(part == "adjoint")
            w = draw(t, o, c, 3, 3).requires_grad_(part == "weights")

            def run(x: Tensor, w: Tensor) -> Tensor:
                options: Any = {"stride": stride, "padding": 1, "implementation": implementation}
                return functional.conv2d(x, w, **options)

            return derivative(run, [x, w], int(part != "forward"), draw)

        yield Case("conv2d", _named(shape), part, Count(flops, WIDTH * numbers), make)


def norm(shape: Shape) -> Iterator[Case]:
    """Batch norm with ReLU in the same pass.

    Args:
        shape: T, N, C and H = W.
    """
    t, _, c, _ = shape
    for order, part in enumerate(PARTS):

        def make(implementation: str, dtype: torch.dtype, device: str, order: int = order) -> Call:
            draw = Draw(dtype, device)
            operands = (images(draw, *shape), draw(t, c), draw(t, c))
            x, weight, bias = [x.requires_grad_(order > 0) for x in operands]

            def run(*x: Tensor) -> Tensor:
                return functional.batch_norm(*x, relu=True, implementation=implementation).y

            return derivative(run, [x, weight, bias], order, draw, [x, weight])

        # x and y; x, dy and dx; x, dy and the cotangents of x, dy and dx.
        numbers = [2, 3, 5][order] * shape[0] * shape[1] * c * shape[3] ** 2
        yield Case("batch_norm", _named(shape), part, Count(0, WIDTH * numbers), make)


def pool(kind: str, shape: Shape) -> Iterator[Case]:
    """A pool of tiles of 2 × 2; its adjoint; for a maximum the gradient of that, too.

    Args:
        kind: "max_pool2d" or "avg_pool2d".
        shape: T, N, C and H = W.
    """
    t, n, c, h = shape
    for order, part in enumerate(PARTS if kind == "max_pool2d" else PARTS[:2]):

        def make(implementation: str, dtype: torch.dtype, device: str, order: int = order) -> Call:
            draw = Draw(dtype, device)
            x = images(draw, *shape).requires_grad_(order > 0)
            function: Any = getattr(functional, kind)

            def run(x: Tensor) -> Tensor:
                found: Tensor = function(x, 2, implementation=implementation)
                return found

            return derivative(run, [x], order, draw, curved=[])

        numbers = t * n * c * (h * h + (h // 2) ** 2)
        yield Case(kind, _named(shape), part, Count(0, WIDTH * numbers), make)


def images(draw: Draw, t: int, n: int, c: int, h: int) -> Tensor:
    """Images that lie as results do, channels last."""
    return draw(t, n, h, h, c).permute(0, 1, 4, 2, 3)


def _named(shape: Shape) -> str:
    return ", ".join(map(str, shape))
