"""One call recorded as a CUDA graph: what it takes without the launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench import clock


def seconds(run: Callable[[], Any], replays: int = 20) -> float | None:
    """Median seconds of a replay, or None if the call cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # it synchronises, or allocates as capture forbids
        return None
    readings = sorted(clock.seconds(graph.replay, "cuda") for _ in range(replays))
    return readings[len(readings) // 2]
