"""How fast the machine is at its best: the rates that floors are divided by.

The ceiling is the best of several candidates, each named in the record. One library's GEMM alone
would do for a machine that the library is tuned for: elsewhere a kernel of our own can be faster,
and would then look as if it were near a limit that is not one. Rates of convolutions are by the
same count as `bench.products`, so that an algorithm with fewer multiplications may exceed the
arithmetic peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bench import clock
from fastkfo.functional import kron_update

DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Sizes:
    """How large what is timed is.

    Attributes:
        gemm: rows and columns of torch.mm's matrices.
        kron: of kron_update's factors and gradient.
        images: in the convolution's batch.
        channels: in and out.
        side: of an image.
        copied: bytes of what is copied.
    """

    gemm: int
    kron: int
    images: int
    channels: int
    side: int
    copied: int


# The copy is larger than the caches of any processor that we know.
CPU = Sizes(gemm=2048, kron=1024, images=8, channels=128, side=56, copied=1 << 29)
CUDA = Sizes(gemm=8192, kron=4096, images=128, channels=256, side=56, copied=1 << 31)


@dataclass(frozen=True)
class Candidate:
    """Something to time: what it is, what runs, and how many flops or bytes that is."""

    name: str
    make: Callable[[], Callable[[], Any]]
    work: int


def measure(device: str, seconds: float = 2.0, sizes: Sizes | None = None) -> dict[str, Any]:
    """Times every candidate on all of PyTorch's threads.

    Args:
        device: "cpu" or "cuda".
        seconds: for all of them, warm-up and the making of operands aside.
        sizes: what is timed; None for sizes that fill the device.

    Returns:
        ``gemm`` by dtype (``gflops``, ``best``, ``candidates``) and ``copy`` (``gb_per_s``, read
        and write), with what decides them: threads, and the switches of TF32 as they were found.
    """
    sizes = sizes or (CUDA if device == "cuda" else CPU)
    products = {dtype: _products(device, dtype, sizes) for dtype in DTYPES}
    share = seconds / (1 + sum(map(len, products.values())))
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "tf32": {
            "matmul": torch.backends.cuda.matmul.allow_tf32,
            "conv": torch.backends.cudnn.allow_tf32,
        },
        "gemm": {},
    }
    for dtype, candidates in products.items():
        rates = {c.name: _rate(c, device, share) for c in candidates}
        best = max(rates, key=rates.__getitem__)
        name = str(dtype).removeprefix("torch.")
        record["gemm"][name] = {"gflops": rates[best], "best": best, "candidates": rates}
    copy = _copy(device, sizes.copied)
    record["copy"] = {"gb_per_s": _rate(copy, device, share), "best": copy.name}
    return record


def _products(device: str, dtype: torch.dtype, sizes: Sizes) -> list[Candidate]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def mm() -> Callable[[], Any]:
        a, b, out = (normal(sizes.gemm, sizes.gemm) for _ in range(3))
        return lambda: torch.mm(a, b, out=out)

    def kron() -> Callable[[], Any]:
        theta, g, left, right = ([normal(sizes.kron, sizes.kron)] for _ in range(4))
        return lambda: kron_update(theta, g, left, right, lr=0.1)

    def conv() -> Callable[[], Any]:
        x = normal(sizes.images, sizes.channels, sizes.side, sizes.side)
        weight = normal(sizes.channels, sizes.channels, 3, 3)
        return lambda: F.conv2d(x, weight, padding=1)

    outputs = sizes.images * sizes.channels * sizes.side**2
    found = [
        Candidate(f"torch.mm {sizes.gemm}", mm, 2 * sizes.gemm**3),
        Candidate(f"kron_update {sizes.kron}", kron, 4 * sizes.kron**3),
    ]
    if dtype == torch.float32:
        name = f"conv2d {sizes.images} x {sizes.channels} x {sizes.side} x {sizes.side}"
        found.append(Candidate(name, conv, outputs * 2 * 9 * sizes.channels))
    return found


def _copy(device: str, size: int) -> Candidate:
    def make() -> Callable[[], Any]:
        source = torch.ones(size // 4, device=device)
        target = torch.zeros_like(source)
        return lambda: target.copy_(source)

    return Candidate(f"copy_ {size} bytes", make, 2 * (size // 4) * 4)


@torch.no_grad()
def _rate(candidate: Candidate, device: str, seconds: float) -> float:
    """The best of what fits into so many seconds, at least three, in 1e9 per second."""
    run = candidate.make()
    run()
    best, spent, runs = math.inf, 0.0, 0
    while spent < seconds or runs < 3:
        took = clock.seconds(run, device)
        best, spent, runs = min(best, took), spent + took, runs + 1
    return candidate.work / best / 1e9
