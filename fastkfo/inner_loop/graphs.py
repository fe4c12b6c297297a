"""CUDA graphs: recorded, replayed, and what surrounds a recording."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_RECORDING = threading.Lock()  # one at a time in a process


class Graph:
    """A CUDA graph of what a function launches.

    Args:
        device: where it runs.
        first: another graph, which this one shares its memory and its stream with.
    """

    def __init__(self, device: torch.device, first: Graph | None = None) -> None:
        self._device, self._graph = device, torch.cuda.CUDAGraph()
        self._stream: Any = torch.cuda.Stream(device) if first is None else first._stream
        self._pool: Any = torch.cuda.graph_pool_handle() if first is None else first._pool

    def record(self, body: Callable[[], Any]) -> Any:
        """Call a function and record what it launches; nothing runs on the device yet."""
        try:
            return self._record(body)
        except BaseException:
            # What failed has left part of a graph behind, which takes no second recording.
            self._graph, self._pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
            raise

    def _record(self, body: Callable[[], Any]) -> Any:
        with (
            _RECORDING,
            torch.cuda.device(self._device),
            _as_it_was(self._device),
            # Other threads (one that pins memory, say) may go on.
            torch.cuda.graph(
                self._graph,
                pool=self._pool,
                stream=self._stream,
                capture_error_mode="thread_local",
            ),
        ):
            return body()

    def beside(self, body: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        """Call a function on the stream of the recording, so that what autograd keeps is of it."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            found = body(*tensors)
        current.wait_stream(self._stream)
        for x in tree_leaves(found):
            if isinstance(x, Tensor):
                x.record_stream(current)
        return found

    def replay(self) -> None:
        """Run it, on the current stream."""
        self._graph.replay()


class Turns:
    """Who used a recording's memory last: another stream waits for that one.

    Args:
        device: where the recording is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: Any = None
        self.lock = threading.RLock()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within this, no other thread uses it, and what others have launched is waited for."""
        with self.lock:
            if self._device.type == "cuda":
                current: Any = torch.cuda.current_stream(self._device)
                if self._last is not None and self._last != current:
                    current.wait_stream(self._last)
                self._last = current
            yield


@contextmanager
def _as_it_was(device: torch.device) -> Iterator[None]:
    """A recording that fails leaves its stream current, and the generator waiting for its graph."""
    generator, stream = generator_of(device), torch.cuda.current_stream(device)
    before = generator.clone_state()
    try:
        yield
    except BaseException:
        generator.graphsafe_set_state(before)
        raise
    finally:
        torch.cuda.set_stream(stream)


def generator_of(device: torch.device) -> torch.Generator:
    """PyTorch's own for a device."""
    if device.type == "cpu":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def modes(device: torch.device) -> Hashable:
    """What a recording holds for of PyTorch's own switches."""
    kind, cudnn = device.type, torch.backends.cudnn
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.fp32_precision,  # the older names raise where both are used
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        cudnn.enabled,
        cudnn.deterministic,
        cudnn.benchmark,
    )


@contextmanager
def without_cached_casts(device: torch.device) -> Iterator[None]:
    """Autocast as it is, but for its copies: one made before would not follow its parameter."""
    kind = device.type
    with torch.autocast(
        kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
    ):
        yield


@contextmanager
def kept(buffers: Sequence[Tensor]) -> Iterator[None]:
    """Put buffers back in the end."""
    before = [x.detach().clone() for x in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


@contextmanager
def random_state(device: torch.device, state: Tensor | None) -> Iterator[None]:
    """Within this, the generator begins at a state; afterwards it is where it was before."""
    if state is None:
        yield
        return
    generator = generator_of(device)
    now = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(now)
