"""Convolutions of T tasks alone, and where a convolutional learner's time goes.

    python -m bench.layers            # two minutes; needs a quiet machine

The rates are of one thread and of all, beside PyTorch's convolution in a loop over tasks, rounds
interleaved, after a gate against it in float64. The shares are self times by the profiler. "Before"
is the same build with the layers' forms and the gradients of large tasks switched off. Records:
`results/<machine>/layers/`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench import machine
from bench.peers import inner_loop_peer
from bench.problem import Problem
from bench.records import write_rows
from fastkfo.functional import conv2d
from fastkfo.inner_loop import forms, run

# T, N, C, H = W, O, stride
SHAPES = [
    (16, 5, 64, 14, 64, 2), (16, 5, 64, 7, 64, 2), (16, 5, 64, 4, 64, 2), (16, 5, 1, 28, 64, 2),
    (4, 25, 32, 32, 32, 1), (4, 25, 3, 32, 32, 1), (2, 5, 160, 10, 160, 1),
]  # fmt: skip
ROUNDS = 15
GROUPS = {
    "products": ("conv", "kron", "gram", "bmm", "mm"),
    "copies": ("copy", "clone", "contiguous", "cat"),
}


def in_a_loop(x: Tensor, w: Tensor, stride: int) -> Tensor:
    """PyTorch's convolution, task after task."""
    return torch.stack([F.conv2d(a, b, None, stride, 1) for a, b in zip(x, w, strict=True)])


def ours(x: Tensor, w: Tensor, stride: int) -> Tensor:
    """All tasks in one call."""
    return conv2d(x, w, stride=stride, padding=1)


PEERS = {"fastkfo": ours, "loop": in_a_loop}


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images that lie as results do, and weights."""
    t, n, c, h, o, _ = shape
    torch.manual_seed(0)
    x = torch.randn(t, n, h, h, c).permute(0, 1, 4, 2, 3).to(dtype).requires_grad_()
    return x, torch.randn(t, o, c, 3, 3).to(dtype).requires_grad_()


def passes(name: str, shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """Forward, adjoint and weight gradient, each alone.

    A Function of Python's computes all gradients that its operands want, not those that are asked
    for, so that ours are timed as raw ops.
    """
    x, w = operands(shape, torch.float32)
    h, stride = shape[3], shape[-1]
    y = PEERS[name](x, w, stride)
    rows = torch.randn(*y.shape[:2], *y.shape[3:], y.shape[2])
    dy, frozen = rows.permute(0, 1, 4, 2, 3), (x.detach(), w.detach(), stride)
    if name == "loop":
        return {
            "forward": lambda: in_a_loop(*frozen),
            "adjoint": lambda: torch.autograd.grad(y, x, dy, retain_graph=True),
            "weights": lambda: torch.autograd.grad(y, w, dy, retain_graph=True),
        }
    ops, window = torch.ops.fastkfo, ([stride] * 2, [1, 1], [1, 1], 1)
    images, weights = x.detach().permute(0, 1, 3, 4, 2), w.detach()
    return {
        "forward": lambda: ours(*frozen),
        "adjoint": lambda: ops.conv2d_input(rows, weights, [h, h], *window),
        "weights": lambda: ops.conv2d_weight(images, rows, [3, 3], *window, True),
    }


def gate(shape: tuple[int, ...]) -> float:
    """The largest relative difference of value and gradients in float64."""
    found = []
    for peer in PEERS.values():
        x, w = operands(shape, torch.float64)
        y = peer(x, w, shape[-1])
        found.append([y, *torch.autograd.grad(y.sin().sum(), (x, w))])
    return max([((a - b).norm() / b.norm()).item() for a, b in zip(*found, strict=True)])


def rates(shape: tuple[int, ...], threads: int) -> dict[str, Any]:
    """GFLOP/s, padding counted as data: medians of interleaved rounds."""
    difference = gate(shape)
    if difference > 1e-10:
        return {"shape": shape, "threads": threads, "wrong": difference}
    t, n, c, _, o, stride = shape
    pixels = ((shape[3] - 1) // stride + 1) ** 2
    flops = 2 * t * n * pixels * o * c * 9
    calls = {(name, k): f for name in PEERS for k, f in passes(name, shape).items()}
    seconds: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(ROUNDS + 1):
        for key, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[key].append(time.perf_counter() - begin)
    found: dict[str, Any] = {name: {} for name in PEERS}
    for (name, k), values in seconds.items():
        found[name][k] = round(flops / statistics.median(values[1:]) / 1e9, 1)
    return {"shape": shape, "threads": threads, "difference": difference, "gflops": found}


@contextmanager
def before() -> Iterator[None]:
    """PyTorch's layers under vmap, all tasks in one graph."""
    with (
        mock.patch.object(forms, "has_kernels", return_value=False),
        mock.patch.object(run, "LARGE_TASK", 1 << 60),
    ):
        yield


def shares(workload: str) -> dict[str, Any]:
    """Where the time of one meta-gradient goes."""
    prepared = inner_loop_peer.PEER.prepare(Problem.named(workload, "kfo"))
    prepared.gradient()
    ms = 1e3 * statistics.median([prepared.seconds() for _ in range(3)])
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        begin = time.perf_counter()
        prepared.gradient()
        wall = time.perf_counter() - begin
    total = dict.fromkeys([*GROUPS, "elementwise"], 0.0)
    for event in seen.key_averages():
        if event.key.startswith(("aten::", "fastkfo::")):
            name = event.key.split("::")[1]
            group = next((g for g, names in GROUPS.items() if any(n in name for n in names)), None)
            total[group or "elementwise"] += event.self_cpu_time_total / 1e6
    part = {group: round(value / wall, 3) for group, value in total.items()}
    return {"ms": round(ms, 1), **part, "rest": round(1 - sum(part.values()), 3)}


def main() -> None:
    threads = torch.get_num_threads()
    found = []
    for count in dict.fromkeys((1, threads)):
        torch.set_num_threads(count)
        for shape in SHAPES:
            found.append(rates(shape, count))
            print(found[-1], flush=True)
    write_rows("layers", "rates", machine.environment("cpu"), found)
    parts = []
    for workload in ("omniglot-cnn", "cifarfs-cnn-2", "miniimagenet-cnn4"):
        with before():
            parts.append({"workload": workload, "when": "before", **shares(workload)})
        parts.append({"workload": workload, "when": "after", **shares(workload)})
        print(*parts[-2:], sep="\n", flush=True)
    write_rows("layers", "shares", machine.environment("cpu"), parts)


if __name__ == "__main__":
    main()
