"""One recorded computation: a CUDA graph, and what it reads and leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


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
            # Other threads (one that pins memory, say) may go on.
            torch.cuda.graph(self._graph, pool=self.pool, capture_error_mode="thread_local"),
        ):
            return body()

    def replay(self) -> None:
        """Run it, on the current stream."""
        self._graph.replay()


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
        run: Callable[[Sequence[Tensor]], tuple[Tensor | None, list[Tensor]]],
        learned: Sequence[Tensor],
        buffers: Sequence[Tensor],
        data: Sequence[Tensor],
        graph: Callable[..., Any] = Graph,
    ) -> None:
        self.run, self.learned, self.buffers = run, list(learned), list(buffers)
        self.data = [x.detach().clone().requires_grad_(x.requires_grad) for x in data]
        self.turns = 0  # forward passes so far
        self.lies = 0  # the one that the gradient's graph would read
        device = self.data[0].device
        self._forward = graph(device)
        self.loss, self.rest = self._forward.record(self._run)
        self._backward: Any = None
        wanted = [*self.learned, *[x for x in self.data if x.requires_grad]]
        if self.loss is None or not self.loss.requires_grad:
            return
        self.d_loss = torch.ones_like(self.loss)
        self._backward = graph(device, self._forward.pool)
        self._flat = self._backward.record(lambda: self._gradients(wanted))
        self._live = self.loss = self.loss.detach()  # the graph of autograd is no longer needed

    def _run(self) -> tuple[Tensor | None, list[Tensor]]:
        found = self.run(self.data)
        self._live = found[0]
        return found

    def _gradients(self, wanted: Sequence[Tensor]) -> list[Tensor]:
        """Those that are not None end to end, one tensor per dtype; where is noted."""
        loss: Any = self._live
        found: Any = torch.autograd.grad(loss, wanted, self.d_loss, allow_unused=True)
        self._places: list[tuple[int, int, torch.Size] | None] = []
        parts: dict[torch.dtype, list[Tensor]] = {}
        ends: dict[torch.dtype, int] = {}
        for g in found:
            if g is None:
                self._places.append(None)
                continue
            begin = ends.get(g.dtype, 0)
            self._places.append((list({**parts, g.dtype: 0}).index(g.dtype), begin, g.shape))
            parts.setdefault(g.dtype, []).append(g.reshape(-1))
            ends[g.dtype] = begin + g.numel()
        return [torch.cat(x) for x in parts.values()]

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
        flat = [x.clone() for x in self._flat]
        return [
            None if at is None else flat[at[0]][at[1] : at[1] + at[2].numel()].view(at[2])
            for at in self._places
        ]


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
