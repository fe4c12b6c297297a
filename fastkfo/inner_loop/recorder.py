"""When an `InnerLoop` is recorded as CUDA graphs, and when a recording still holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastkfo.inner_loop.graphs import Graph, Learned, Recording
from fastkfo.inner_loop.guards import normal_mode
from fastkfo.inner_loop.inputs import Batch
from fastkfo.inner_loop.leaves import Layout
from fastkfo.inner_loop.loss import PerTask
from fastkfo.inner_loop.run import Outcome
from fastkfo.inner_loop.watched import Watched
from fastkfo.optim.recognise import is_plain

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
        self._graph = graph
        self._known: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._watched: Watched | None = None
        self._own: str | None = None  # why the loop, as it is watched, is not recorded
        self.why_not: str | None = None  # the last refusal

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without recordings: those belong to one device's memory."""
        return Recorder, ()

    def outcome(
        self, loop: InnerLoop, batch: Batch, steps: int, weights: Tensor | None
    ) -> Outcome | None:
        """What a recording gives, or None: the call is to run as it is.

        Args:
            loop: the inner loop.
            batch: tasks of equal shapes.
            steps: K.
            weights: of the query losses after every step, or None.

        Returns:
            The outcome, copied out of the graphs' memory.

        Raises:
            ValueError: the loop's `capture` is True, and this call cannot be recorded.
            RuntimeError: `capture` is True, and recording failed.
        """
        data = batch.tensors() if weights is None else [*batch.tensors(), weights]
        self.why_not = self._refusal(loop, data)
        if self.why_not is not None:
            if loop.capture is True and self.why_not != _AROUND:
                raise ValueError(f"capture: expected a call that can be recorded: {self.why_not}")
            return None
        key = self._key(batch, data, steps)
        found = self._known.setdefault(key, Recorded())
        self._known.move_to_end(key)
        while len(self._known) > MOST:
            self._known.popitem(last=False)
        with normal_mode():
            if found.recording is None:
                found.calls += 1
                if found.calls <= EAGER_CALLS:
                    return None
                found.record(loop, batch, steps, weights, self._graph)
                self.why_not = found.refused
                if found.recording is None:
                    if loop.capture is True:
                        raise RuntimeError(f"capture: the inner loop {found.refused}")
                    return None
            return found(data)

    def at_once(self, loop: InnerLoop, batch: Batch, steps: int | None) -> Outcome | None:
        """The same of a call that was recorded already, before anything else is looked at."""
        data = [x for x in batch if x is not None]
        if not self._known or any([type(x) is not Tensor for x in data]):
            return None
        if self._refusal(loop, data) is not None:
            return None
        key = self._key(batch, data, loop.steps if steps is None else steps)
        found = self._known.get(key)
        if found is None or found.recording is None:
            return None
        self._known.move_to_end(key)
        with normal_mode():
            return found(data)

    def _key(self, batch: Batch, data: Sequence[Tensor], steps: int) -> Hashable:
        return _kind(batch, data, steps), *[x.data_ptr() for x in self._tensors], _modes(data[0])

    def _refusal(self, loop: InnerLoop, data: Sequence[Tensor]) -> str | None:
        """Why this call is not recorded, or None."""
        if (reason := of_devices(data)) is not None:
            return reason
        if self._watched is None or not self._watched.unchanged():
            self._known.clear()
            self._watched, self._own = Watched(loop.modules()), of_loop(loop)
            self._tensors = [*loop.parameters(), *loop.buffers()]
        if self._own is not None:
            return self._own
        if torch._C._are_functorch_transforms_active():
            return "a transform of torch.func is active"
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return _AROUND
        return None


class Recorded:
    """One kind of call: how often it came, and its recording or why there is none."""

    def __init__(self) -> None:
        self.calls = 0
        self.refused: str | None = None
        self.recording: Recording | None = None

    def record(
        self, loop: InnerLoop, batch: Batch, steps: int, weights: Tensor | None, graph: Any
    ) -> None:
        """Record, or note why that failed; once."""
        if self.refused is not None:
            return
        layout, trees = Layout(batch), [tree_flatten(None)[1]]
        weighted = weights is not None

        def run(data: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
            tensors, own = (data[:-1], data[-1]) if weighted else (data, None)
            out = loop.eager(layout.batch(tensors), steps, own)
            seen, trees[0] = tree_flatten(out.predictions)
            return out.loss, [out.support_loss, out.finite, *seen]

        data = batch.tensors() if weights is None else [*batch.tensors(), weights]
        leaves = loop.leaves(batch, weights)
        learned = leaves._replace(weights=[], data=[]).flat()
        learned = [x for x in dict.fromkeys(learned) if x.requires_grad]
        kind = data[0].device.type
        try:
            with torch.autocast(
                kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind),
                cache_enabled=False,  # a cached copy would not follow its parameter
            ):  # fmt: skip
                self.recording = Recording(
                    run, Learned(list(loop.modules()), learned), list(loop.buffers()), data, graph
                )
            self._predictions = trees[0]
        except RuntimeError as error:
            self.refused = f"cannot be recorded: {str(error).splitlines()[0]}"

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
    if (reason := loop.own_step()) is not None:
        return reason
    if loop.memory != "full" or loop.chunk_size is not None:
        return "memory and chunk_size put random states back, which a graph cannot"
    return None if loop.capture is True else _unknown(loop)


def _unknown(loop: InnerLoop) -> str | None:
    """What of the loop might do something else the next time; None if nothing is known to."""
    hint = "may depend on what a graph would not see; capture=True records it all the same"
    for name in ("loss", "query_loss"):
        loss = getattr(loop, name)
        known = not isinstance(loss, PerTask) or isinstance(loss.loss, nn.Module)
        if not known and loss.fused_name() is None:
            return f"{name}, a function of its own, {hint}"
    for module in loop.modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        known = kind.startswith(_PACKAGES) and is_plain(module)
        if not known or (kind in _LAMBDAS and not _of_a_package(module.lmb)):
            return f"{type(module).__name__} {hint}"
    return None


def _of_a_package(function: Any) -> bool:
    """Whether a function is one of the packages' own, not somebody's."""
    return f"{getattr(function, '__module__', '')}.".startswith(_PACKAGES)


def _kind(batch: Batch, data: Sequence[Tensor], steps: int) -> Hashable:
    """What a recording holds for of its arguments."""
    types: Hashable = tuple([type(x) for x in batch])
    if any([x is not None and type(x) is not Tensor for x in batch]):
        types = str(tree_flatten(tuple(batch))[1])
    return types, steps, *[(x.shape, x.dtype, x.device, x.requires_grad) for x in data]


def _modes(like: Tensor) -> Hashable:
    """What a recording holds for of PyTorch's own switches."""
    kind = like.device.type
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
    )
