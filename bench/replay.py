"""Calls recorded as a CUDA graph: what they take without the launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench import clock


def graph_of(run: Callable[[], Any], calls: int = 1) -> torch.cuda.CUDAGraph | None:
    """A graph of so many calls, or None if they cannot be captured.

    Args:
        run: what is called. Where it differentiates what exists already, that must have been
            computed on the stream that is current, and that one not the default.
        calls: how often, one after the other.
    """
    graph = torch.cuda.CUDAGraph()
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream() if current == torch.cuda.default_stream() else current
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        current.wait_stream(side)
        with torch.cuda.graph(graph, stream=side):
            for _ in range(calls):
                run()
    except RuntimeError:  # it synchronises, or allocates as capture forbids
        return None
    return graph


def seconds(run: Callable[[], Any], replays: int = 20) -> float | None:
    """Median seconds of a replay, or None if the call cannot be captured."""
    graph = graph_of(run)
    return None if graph is None else replayed(graph, replays)


def replayed(graph: torch.cuda.CUDAGraph, replays: int = 20) -> float:
    """Median seconds of a replay."""
    graph.replay()  # the first one also takes the graph to the device
    readings = sorted(clock.seconds(graph.replay, "cuda") for _ in range(replays))
    return readings[len(readings) // 2]
