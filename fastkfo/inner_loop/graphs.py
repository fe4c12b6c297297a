"""One recorded computation: a CUDA graph, and what it reads and leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Run = Callable[[Sequence[Tensor]], tuple[Tensor | None, list[Tensor]]]


class Graph:
    """A CUDA graph of what a function launches.

    Args:
        device: where it runs.
        pool: of another graph, which this one shares its memory with.
    """

    def __init__(self, device: torch.device, pool: Any = None) -> None:
        self._device, self._graph = device, torch.cuda.CUDAGraph()
        self.pool = torch.cuda.graph_pool_handle() if pool is None else pool

    def record(self, body: Callable[[], Any]) -> Any:
        """Call a function and record what it launches; nothing runs on the device yet."""
        with (
            torch.cuda.device(self._device),
            _random_state_survives(self._device),
            # Other threads (one that pins memory, say) may go on.
            torch.cuda.graph(
                self._graph,
                pool=self.pool,
                stream=self.stream(self._device),
                capture_error_mode="thread_local",
            ),
        ):
            return body()

    def replay(self) -> None:
        """Run it, on the current stream."""
        self._graph.replay()

    @classmethod
    def beside(cls, body: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        """Call a function on the stream of recordings, so that what autograd keeps is of it."""
        stream = cls.stream(tensors[0].device)
        current = torch.cuda.current_stream(stream.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            found = body(*tensors)
        current.wait_stream(stream)
        for x in tree_leaves(found):
            if isinstance(x, Tensor):
                x.record_stream(current)
        return found

    @staticmethod
    def stream(device: torch.device) -> torch.cuda.Stream:
        """Where graphs of a device are recorded."""
        if device not in _STREAMS:
            _STREAMS[device] = torch.cuda.Stream(device)
        return _STREAMS[device]


@contextmanager
def _random_state_survives(device: torch.device) -> Iterator[None]:
    """A recording that fails would leave the generator waiting for a graph, for ever."""
    generator = torch.cuda.default_generators[device.index or 0]
    before = generator.clone_state()
    try:
        yield
    except BaseException:
        generator.graphsafe_set_state(before)
        raise


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


class Recording:
    """An inner loop for batches of one shape: forward pass and meta-gradient, a graph each.

    The graphs read the learned tensors where they lie, and a copy of the batch. The graph of the
    gradient reads what the last forward pass left; a gradient that comes later than another forward
    pass runs its own once more.

    Args:
        run: the inner loop as a function of a batch's tensors, which gives a loss (or None) and
            other tensors. The loss is differentiable.
        learned: what a gradient is wanted of, beside the tensors of the batch that require one.
        buffers: what `run` changes.
        data: the tensors of a batch.
        graph: makes a `Graph`.
    """

    def __init__(
        self,
        run: Run,
        learned: Learned,
        buffers: Sequence[Tensor],
        data: Sequence[Tensor],
        graph: Callable[..., Any] = Graph,
    ) -> None:
        self.run, self.learned, self.buffers = run, learned.tensors, list(buffers)
        self._aliased = learned.aliased
        self.data = [x.detach().clone().requires_grad_(x.requires_grad) for x in data]
        self.turns = 0  # forward passes so far
        self.lies = 0  # the one that the gradient's graph would read
        device = self.data[0].device
        self._forward = graph(device)
        self.loss, self.rest = self._forward.record(self._run)
        self._backward: Any = None
        wanted = [*learned.aliases, *[x for x in self.data if x.requires_grad]]
        if self.loss is None or not self.loss.requires_grad:
            return
        self.d_loss = torch.ones_like(self.loss)
        self._backward = graph(device, self._forward.pool)
        self._flat = self._backward.record(lambda: self._gradients(wanted))
        self._live = self.loss = self.loss.detach()  # the graph of autograd is no longer needed

    def _run(self) -> tuple[Tensor | None, list[Tensor]]:
        with self._aliased():
            found = self.run(self.data)
        self._live = found[0]
        return found

    def _gradients(self, wanted: Sequence[Tensor]) -> list[Tensor]:
        """Those that are not None end to end, one tensor per dtype."""
        loss: Any = self._live
        found: Any = torch.autograd.grad(loss, wanted, self.d_loss, allow_unused=True)
        parts: dict[torch.dtype, list[int]] = {}
        for k, g in enumerate(found):
            if g is not None:
                parts.setdefault(g.dtype, []).append(k)
        self._places = [(ks, [torch.empty_like(wanted[k]) for k in ks]) for ks in parts.values()]
        self._count = len(found)
        return [torch.cat([found[k].reshape(-1) for k in ks]) for ks in parts.values()]

    def __call__(self, data: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """Loss and the other results, all of them copies."""
        if self._backward is None:
            self.forward(data)
            loss = None if self.loss is None else self.loss.clone()
        else:
            loss = Replayed.apply(self, len(self.learned), *self.learned, *data)
        return loss, [x.clone() for x in self.rest]

    def forward(self, data: Sequence[Tensor]) -> None:
        """Run the forward pass."""
        with torch.no_grad():
            torch._foreach_copy_(self.data, list(data))
        self._forward.replay()
        self.turns += 1
        self.lies = self.turns

    def again(self, data: Sequence[Tensor], turn: int) -> None:
        """Run an earlier one for its gradient's sake alone: buffers stay as they are."""
        with kept(self.buffers):
            self.forward(data)
        self.lies = turn

    def backward(self, d_loss: Tensor) -> list[Tensor | None]:
        """Gradients of what is learned, then of the data that require one."""
        self.d_loss.copy_(d_loss)
        self._backward.replay()
        found: list[Tensor | None] = [None] * self._count
        for flat, (places, like) in zip(self._flat, self._places, strict=True):
            parts = torch._C._nn.unflatten_dense_tensors(flat.clone(), like)
            for k, part in zip(places, parts, strict=True):
                found[k] = part
        return found


class Learned:
    """Learned tensors, and others that share their memory and stand in while something is recorded.

    Autograd remembers the stream on which a tensor first needed a gradient for as long as any graph
    with it is alive, last iteration's loss for example; and a recording may not wait for it.

    Args:
        modules: whose parameters they are.
        tensors: those that a gradient is wanted of.
    """

    def __init__(self, modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self.aliases: list[Tensor] = [nn.Parameter(x.detach()) for x in tensors]
        other = {id(x): y for x, y in zip(self.tensors, self.aliases, strict=True)}
        self._places: list[tuple[Any, str, Any, Tensor]] = [
            (m._parameters, name, p, other[id(p)])
            for m in modules
            for name, p in m._parameters.items()
            if id(p) in other
        ]

    @contextmanager
    def aliased(self) -> Iterator[None]:
        """Within this, the modules have the others."""
        try:
            for held, name, _, alias in self._places:
                held[name] = alias
            yield
        finally:
            for held, name, own, _ in self._places:
                held[name] = own


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


class Replayed(torch.autograd.Function):
    """A recording as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, count: int, *tensors: Tensor) -> Tensor:
        """The loss."""
        recording.forward(tensors[count:])
        ctx.recording, ctx.count, ctx.turn = recording, count, recording.turns
        ctx.save_for_backward(*tensors)  # also notices what changes in place before the gradient
        assert recording.loss is not None
        return recording.loss.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients; without a graph of their own they are replayed."""
        recording, count, tensors = ctx.recording, ctx.count, ctx.saved_tensors
        data = tensors[count:]
        if torch.is_grad_enabled():  # create_graph: not recorded
            found = _differentiable(recording, tensors[:count], data, cotangents[0])
        else:
            if recording.lies != ctx.turn:
                recording.again(data, ctx.turn)
            found = recording.backward(cotangents[0])
        of_data = iter(found[count:])
        wanted = [next(of_data) if x.requires_grad else None for x in data]
        return None, None, *found[:count], *wanted


def _differentiable(
    recording: Recording, learned: Sequence[Tensor], data: Sequence[Tensor], d_loss: Tensor
) -> list[Tensor | None]:
    with kept(recording.buffers):
        loss, _ = recording.run(data)
    assert loss is not None
    wanted = [*learned, *[x for x in data if x.requires_grad]]
    return list(torch.autograd.grad(loss, wanted, d_loss, create_graph=True, allow_unused=True))
