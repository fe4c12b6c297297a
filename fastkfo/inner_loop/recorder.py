"""When an `InnerLoop` is recorded as CUDA graphs, and when a recording still holds."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastkfo.inner_loop.graphs import Graph, modes
from fastkfo.inner_loop.guards import first_line, normal_mode
from fastkfo.inner_loop.inputs import Batch
from fastkfo.inner_loop.leaves import Layout
from fastkfo.inner_loop.loss import PerTask
from fastkfo.inner_loop.options import rule_of
from fastkfo.inner_loop.recording import Recording, Results, Source
from fastkfo.inner_loop.run import Outcome
from fastkfo.inner_loop.watched import Watched
from fastkfo.optim.recognise import global_hooks, is_plain

if TYPE_CHECKING:
    from fastkfo.inner_loop.inner_loop import InnerLoop

DEVICE = "cuda"
EAGER_CALLS = 2  # before one is recorded: libraries load, kernels are compiled, workspaces made
MOST = 4  # recordings of one inner loop; the one that was used least recently goes first

# Modules whose forward is a function that they were given.
_LAMBDAS = {"fastkfo.nn.misc.Lambda", "learn2learn.nn.misc.Lambda"}
_AROUND = "a graph is being recorded around it"
_PACKAGES = ("torch.nn.", "fastkfo.", "learn2learn.")


class Recorder:
    """The recordings of one inner loop.

    Args:
        graph: makes a graph.
    """

    def __init__(self, graph: Any = Graph) -> None:
        self._graph, self._lock = graph, threading.RLock()
        self.failed: str | None = None  # why the last attempt to record failed
        self.why_not: str | None = None  # why the last call was not replayed
        self._said = False
        self.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without recordings: those belong to one device's memory."""
        return Recorder, ()

    def clear(self) -> None:
        """Let go of all recordings, and their memory."""
        self._known: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._watched: Watched | None = None
        self._loop: Any = None  # a weak reference: its memory should not wait for a collector
        self._options: Any = None
        self._tensors: list[Tensor] = []
        self._refused: str | None = None  # why the loop, as it is watched, is not recorded

    def wanted(self, loop: InnerLoop, listed: bool) -> bool:
        """Whether a call may be recorded, or was; if not, nothing is kept.

        Args:
            loop: the inner loop.
            listed: whether the tasks are a list.

        Returns:
            Whether to ask `at_once` and `outcome`.

        Raises:
            ValueError: the loop's `capture` is True, and tasks are a list.
        """
        if loop.capture is False:
            self.clear()
            return False
        if listed and loop.capture is True:
            raise ValueError(
                "capture: expected a call that can be recorded: x_s is a list of tasks"
            )
        return not listed and not torch.compiler.is_compiling()

    def outcome(
        self, loop: InnerLoop, batch: Batch, steps: int, weights: Tensor | None
    ) -> Outcome | None:
        """What a recording gives, or None: the call is to run as it is.

        Args:
            loop: the inner loop.
            batch: tasks of equal shapes.
            steps: K, the number of steps.
            weights: of the query losses after every step, or None.

        Returns:
            The outcome, copied out of the graphs' memory.

        Raises:
            ValueError: the loop's `capture` is True, and this call cannot be recorded.
            RuntimeError: `capture` is True, and recording failed.
        """
        batch = batch.normal()
        data = batch.tensors() if weights is None else [*batch.tensors(), weights]
        with self._lock, normal_mode():
            self.why_not = self._refusal(loop, data)
            if self.why_not is not None:
                if loop.capture is True and self.why_not != _AROUND:
                    raise ValueError(
                        f"capture: expected a call that can be recorded: {self.why_not}"
                    )
                return None
            key = self._key(batch, data, steps)
            found = self._known.setdefault(key, Recorded())
            self._known.move_to_end(key)
            while len(self._known) > MOST:
                self._known.popitem(last=False)
            if found.recording is None:
                found.calls += 1
                if found.calls <= EAGER_CALLS:
                    return None
                found.record(self, loop, batch, steps, weights)
                self.why_not = self.failed = found.refused
                if found.recording is None:
                    if loop.capture is True:
                        found.refused = None  # asked for by name: the next call tries again
                        raise RuntimeError(f"capture: the inner loop {self.failed}")
                    self._say_once()
                    return None
            return found(data)

    def at_once(self, loop: InnerLoop, batch: Batch, steps: int | None) -> Outcome | None:
        """The same of a call that was recorded already, before anything else is looked at."""
        data = [x for x in batch if x is not None]
        if not self._known or any([type(x) is not Tensor or x.is_inference() for x in data]):
            return None
        with self._lock, normal_mode():
            if self._refusal(loop, data) is not None:
                return None
            key = self._key(batch, data, loop.steps if steps is None else steps)
            found = self._known.get(key)
            if found is None or found.recording is None:
                return None
            self._known.move_to_end(key)
            self.why_not = None
            return found(data)

    def record(self, source: Source, data: Sequence[Tensor]) -> Recording:
        """A recording."""
        return Recording(source, data, self._graph)

    def source(self, loop: InnerLoop, run: Any, learned: Sequence[Tensor]) -> Source:
        """What is recorded of a loop."""
        known = {id(x) for x in learned}
        others = [x for x in self._tensors if id(x) not in known]
        watched = self._watched
        assert watched is not None
        return Source(run, list(loop.modules()), learned, others, watched.unchanged)

    def _refusal(self, loop: InnerLoop, data: Sequence[Tensor]) -> str | None:
        """Why this call is not recorded, or None."""
        if (reason := of_devices(data)) is not None:
            first = next(loop.parameters(), None)
            if first is None or first.device.type != DEVICE:
                self.clear()  # the loop has left; a batch that went astray is no reason
            return reason
        same = self._loop is not None and self._loop() is loop
        options = _options(loop)
        if not same or options != self._options or not self._unchanged():
            self.clear()
            self._loop, self._options = weakref.ref(loop), options
            self._watched = Watched([m for m in loop.modules() if m is not loop])
            self._tensors = [*loop.parameters(), *loop.buffers()]
            self._refused = of_loop(loop) or _elsewhere(loop, self._tensors, data[0].device)
        if self._refused is not None:
            return self._refused
        if torch._C._are_functorch_transforms_active():
            return "a transform of torch.func is active"
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return _AROUND
        return None

    def _say_once(self) -> None:
        if self.failed is not None and not self._said:
            self._said = True
            warnings.warn(
                f"fastkfo: calls run without CUDA graphs: the inner loop {self.failed}",
                stacklevel=6,
            )

    def _unchanged(self) -> bool:
        return self._watched is not None and self._watched.unchanged()

    def _key(self, batch: Batch, data: Sequence[Tensor], steps: int) -> Hashable:
        """What a recording holds for, beside what is watched."""
        types: Hashable = tuple([type(x) for x in batch])
        if any([x is not None and type(x) is not Tensor for x in batch]):
            types = str(tree_flatten(tuple(batch))[1])
        return (
            types,
            steps,
            *[(x.shape, x.dtype, x.device, x.requires_grad) for x in data],
            *[(x.data_ptr(), x.stride()) for x in self._tensors],
            modes(data[0].device),
        )


class Recorded:
    """One kind of call: how often it came, and its recording or why there is none."""

    def __init__(self) -> None:
        self.calls = 0
        self.refused: str | None = None
        self.recording: Recording | None = None

    def record(
        self,
        recorder: Recorder,
        loop: InnerLoop,
        batch: Batch,
        steps: int,
        weights: Tensor | None,
    ) -> None:
        """Record, or note why that failed; once."""
        if self.refused is not None:
            return
        layout, trees = Layout(batch), [tree_flatten(None)[1]]
        weighted, weakly = weights is not None, weakref.ref(loop)

        def run(data: Sequence[Tensor]) -> Results:
            tensors, own = (data[:-1], data[-1]) if weighted else (data, None)
            of: Any = weakly()
            out = of.eager(layout.batch(tensors), steps, own)
            seen, trees[0] = tree_flatten(out.predictions)
            if not all([isinstance(x, Tensor) for x in seen]):
                raise TypeError("its predictions hold something that is no tensor")
            return out.loss, [out.support_loss, out.finite, *seen]

        data = batch.tensors() if weights is None else [*batch.tensors(), weights]
        leaves = loop.leaves(batch, weights)._replace(weights=[], data=[]).flat()
        learned = [x for x in dict.fromkeys(leaves) if x.requires_grad]
        try:
            self.recording = recorder.record(recorder.source(loop, run, learned), data)
            self._predictions = trees[0]
        except Exception as error:  # the call runs as it is, and raises what is not the recording's
            self.refused = f"cannot be recorded: {first_line(error)}"

    def __call__(self, data: Sequence[Tensor]) -> Outcome:
        """A replay."""
        assert self.recording is not None
        loss, (support, finite, *seen) = self.recording(data)
        return Outcome(loss, tree_unflatten(seen, self._predictions), support, finite)


def of_devices(data: Sequence[Tensor]) -> str | None:
    """Why calls with such data are not recorded, or None."""
    devices = {x.device for x in data}
    if len(devices) == 1 and data[0].device.type == DEVICE:
        return None
    return f"a CUDA graph needs CUDA tensors, got {', '.join(sorted([str(x) for x in devices]))}"


def of_loop(loop: InnerLoop) -> str | None:
    """Why an inner loop is not recorded, or None."""
    if loop.capture is False:
        return "capture=False"
    if global_hooks():
        return "there are hooks for all modules"
    if (reason := loop.own_step()) is not None:
        return reason
    if loop.memory != "full" or loop.chunk_size is not None:
        return "memory and chunk_size put random states back, which a graph cannot"
    return None if loop.capture is True else _unknown(loop)


def _options(loop: InnerLoop) -> tuple[Any, ...]:
    """What an inner loop is, beside its modules' own attributes."""
    return (
        *loop._modules.values(), loop.loss, loop.query_loss, loop.memory, loop.buffer_mode,
        loop.chunk_size, loop.backend, loop.capture, loop.training, *loop.options.values(),
    )  # fmt: skip


def _elsewhere(loop: InnerLoop, tensors: Sequence[Tensor], device: torch.device) -> str | None:
    """A graph has a number for what lies on another device, and sees parameters alone."""
    known = {id(x) for x in tensors}
    rule = rule_of(loop.learner, loop.options)
    if any([id(x) not in known for x in rule.rates]):
        return "a learning rate is a tensor and no parameter"
    if rule.state.flat():
        return "the learner has taken steps of its inner optimizer already"
    others = sorted({str(x.device) for x in tensors if x.device != device})
    return f"parameters or buffers are on {', '.join(others)}" if others else None


def _unknown(loop: InnerLoop) -> str | None:
    """What of the loop might do something else the next time; None if nothing is known to."""
    hint = "may depend on what a graph would not see; capture=True records it all the same"
    for name in ("loss", "query_loss"):
        loss = getattr(loop, name)
        known = not isinstance(loss, PerTask) or isinstance(loss.loss, nn.Module)
        if not known and loss.fused_name() is None:
            return f"{name}, a function of its own, {hint}"
    optimizer = rule_of(loop.learner, loop.options).inner.optimizer
    if optimizer is not None and not _of_a_package(type(optimizer)):
        return f"{type(optimizer).__name__} {hint}"
    for module in loop.modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        known = kind.startswith(_PACKAGES) and is_plain(module)
        if not known or (kind in _LAMBDAS and not _of_a_package(module.lmb)):
            return f"{type(module).__name__} {hint}"
    return None


def _of_a_package(function: Any) -> bool:
    """Whether a function is one of the packages' own, not somebody's."""
    return f"{getattr(function, '__module__', '')}.".startswith(_PACKAGES)
