"""An inner loop for one shape as two CUDA graphs, and as one node of autograd's graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastkfo.inner_loop.graphs import (
    Graph,
    Turns,
    generator_of,
    kept,
    random_state,
    without_cached_casts,
)
from fastkfo.inner_loop.prompt import has_strays

Results = tuple["Tensor | None", list[Tensor]]


class Source:
    """What is recorded: a function of a batch's tensors, and what it reads beside them.

    Args:
        run: gives a loss (or None) and other tensors. The loss is differentiable.
        modules: that hold the parameters.
        learned: what a gradient is wanted of, beside the tensors of the batch that require one.
        others: what else is read: frozen parameters, buffers.
        unchanged: whether the modules still are as they were.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Tensor]], Results],
        modules: Sequence[nn.Module],
        learned: Sequence[Tensor],
        others: Sequence[Tensor],
        unchanged: Callable[[], bool],
    ) -> None:
        self.run, self.learned, self.others = run, list(learned), list(others)
        self.unchanged = unchanged
        place = {id(x): k for k, x in enumerate(self.learned)}
        self._places: list[tuple[Any, str, int]] = [
            (m._parameters, name, place[id(p)])
            for m in modules
            for name, p in m._parameters.items()
            if id(p) in place
        ]
        held = {k for _, _, k in self._places}
        if len(held) < len(self.learned):
            raise RuntimeError("it learns a tensor that is no module's parameter")

    @contextmanager
    def reading(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Within this, the modules have other tensors in place of the learned ones."""
        try:
            for held, name, k in self._places:
                held[name] = tensors[k]
            yield
        finally:
            for held, name, k in self._places:
                held[name] = self.learned[k]


class Recording:
    """Forward pass and meta-gradient, a graph each.

    The graphs read the learned tensors where they lie, and a copy of the batch. The graph of the
    gradient reads what the last forward pass left, once; a gradient that comes later than another
    forward pass, or a second time, runs its own pass again.

    Recorded are aliases of the learned tensors: autograd remembers the stream on which a tensor
    first needed a gradient for as long as any graph with it is alive (last iteration's loss, say),
    and a recording may not wait for that.

    Args:
        source: what is recorded.
        data: the tensors of a batch.
        graph: makes a `Graph`.

    Raises:
        RuntimeError: it cannot be recorded.
    """

    def __init__(
        self, source: Source, data: Sequence[Tensor], graph: Callable[..., Any] = Graph
    ) -> None:
        self.source, self.device = source, data[0].device
        self.turns = Turns(self.device)
        self.count = 0  # forward passes so far
        self.lies = 0  # the one that the gradient's graph would read; 0: none
        self._draws: bool | None = None  # whether a pass takes random numbers
        self._data = [x.detach().clone().requires_grad_(x.requires_grad) for x in data]
        self._aliases: list[Tensor] = [nn.Parameter(x.detach()) for x in source.learned]
        wanted = [*self._aliases, *[x for x in self._data if x.requires_grad]]
        versions = [x._version for x in source.others]
        self._forward = graph(self.device)
        self._loss, self._rest = self._forward.record(self._pass)
        self._moved = [
            x for x, v in zip(source.others, versions, strict=True) if x._version != v
        ]  # running statistics
        moved = {id(x) for x in self._moved}
        self._still = [x for x in source.others if id(x) not in moved]
        self._backward: Any = None
        if self._loss is not None and self._loss.requires_grad:
            if has_strays(self._loss, wanted):
                raise RuntimeError("a function in it closes over a tensor that requires a gradient")
            self._d_loss = torch.ones_like(self._loss)
            self._backward = graph(self.device, self._forward)
            self._gradients = self._backward.record(lambda: self._differentiate(wanted))
            self._live = self._loss = self._loss.detach()  # autograd's graph is not needed any more

    def _pass(self) -> Results:
        with self.source.reading(self._aliases), without_cached_casts(self.device):
            found = self.source.run(self._data)
        self._live = found[0]
        return found

    def _differentiate(self, wanted: Sequence[Tensor]) -> list[Tensor | None]:
        loss: Any = self._live
        return list(torch.autograd.grad(loss, wanted, self._d_loss, allow_unused=True))

    def __call__(self, data: Sequence[Tensor]) -> Results:
        """Loss and the other results, all of them copies."""
        with self.turns.taken():
            if self._backward is None:
                self.forward(data)
                loss = None if self._loss is None else self._loss.clone()
            else:
                counts = (len(self.source.learned), len(data))
                loss = Replayed.apply(self, counts, *self.source.learned, *data, *self._still)
            return loss, [x.clone() for x in self._rest]

    def forward(self, data: Sequence[Tensor]) -> Tensor | None:
        """Run the forward pass.

        Args:
            data: the tensors of a batch.

        Returns:
            Where the generator was before, if the pass takes random numbers.
        """
        state = None if self._draws is False else generator_of(self.device).get_state()
        with torch.no_grad():
            torch._foreach_copy_(self._data, list(data))
        self._forward.replay()
        if self._moved:
            torch.autograd.graph.increment_version(self._moved)
        if self._draws is None:
            assert state is not None
            self._draws = not torch.equal(state, generator_of(self.device).get_state())
        self.count += 1
        self.lies = self.count
        return state if self._draws else None

    def loss(self) -> Tensor:
        """A copy of the loss."""
        assert self._loss is not None
        return self._loss.clone()

    def gradient(
        self, d_loss: Tensor, data: Sequence[Tensor], turn: int, state: Tensor | None
    ) -> list[Tensor | None]:
        """Gradients of what is learned, then of the data that require one.

        Args:
            d_loss: the loss's cotangent.
            data: the batch of the forward pass.
            turn: which one that was.
            state: where the generator was before it.

        Returns:
            Copies.
        """
        with self.turns.taken(), torch.no_grad():
            if self.lies != turn:
                with kept(self._moved), random_state(self.device, state):
                    self.forward(data)
            self._d_loss.copy_(d_loss)
            self._backward.replay()
            self.lies = 0  # the graph's own memory was reused on the way
            found = [None if g is None else torch.empty_like(g) for g in self._gradients]
            pairs = [(a, g) for a, g in zip(found, self._gradients, strict=True) if a is not None]
            if pairs:
                torch._foreach_copy_([a for a, _ in pairs], [g for _, g in pairs])
            return found

    def differentiable(
        self, d_loss: Tensor, learned: Sequence[Tensor], data: Sequence[Tensor], state: Any
    ) -> list[Tensor | None]:
        """The same with a graph of their own: not recorded.

        Args:
            d_loss: the loss's cotangent.
            learned: the learned tensors.
            data: the batch of the forward pass.
            state: where the generator was before that.

        Returns:
            The gradients.

        Raises:
            RuntimeError: the modules have changed since they were recorded.
        """
        if not self.source.unchanged():
            raise RuntimeError("the inner loop changed since the forward pass of this gradient")
        # Views: what comes to one tensor by way of another must not be counted for both.
        own, batch = ([x.view_as(x) for x in group] for group in (learned, data))
        with (
            self.source.reading(own),
            kept(self._moved),
            random_state(self.device, state),
            without_cached_casts(self.device),
        ):
            loss: Any = self.source.run(batch)[0]
        wanted = [*own, *[x for x in batch if x.requires_grad]]
        return list(torch.autograd.grad(loss, wanted, d_loss, create_graph=True, allow_unused=True))


class Replayed(torch.autograd.Function):
    """A recording as one node of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any, recording: Recording, counts: tuple[int, int], *tensors: Tensor
    ) -> Tensor:
        """The loss. tensors: learned, data, and what else the graphs read."""
        learned, data = counts
        ctx.state = recording.forward(tensors[learned : learned + data])
        ctx.recording, ctx.counts, ctx.turn = recording, counts, recording.count
        kind = recording.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(*tensors)  # also notices what changes in place before the gradient
        return recording.loss()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients; with a graph of their own if create_graph asks for it."""
        count, size = ctx.counts
        tensors = ctx.saved_tensors
        learned, data = tensors[:count], tensors[count : count + size]
        if torch.is_grad_enabled():
            with torch.autocast(*ctx.autocast):
                found = ctx.recording.differentiable(cotangents[0], learned, data, ctx.state)
        else:
            found = ctx.recording.gradient(cotangents[0], data, ctx.turn, ctx.state)
        of_data = iter(found[count:])
        wanted = [next(of_data) if x.requires_grad else None for x in data]
        return None, None, *found[:count], *wanted, *[None] * (len(tensors) - count - size)
