"""No memory while a call is recorded, or at all: a clear error, and everything goes on as before.

The graphs are a stand-in that runs on a CPU; tests/test_inner_loop_capture_gpu.py has CUDA's.
"""

import copy
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._C._functorch import is_batchedtensor

import fastkfo
from fastkfo.inner_loop import graphs
from fastkfo.inner_loop.captured import Captured
from tests.batches import no_warnings
from tests.graphs_on_cpu import Graph
from tests.recorded_loops import CALLS, batch, gradients, learner, on_cpu, pair, same

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation for more"
TOLD = "the inner loop cannot be recorded: CUDA out of memory. Tried to allocate 2.00 GiB.$"


class Full:
    """A device without memory, from the n-th of its recordings on; 1 is that of a loss."""

    def __init__(self, monkeypatch, first=1):
        self.count, self.first, self.plain = 0, first, Graph.record
        monkeypatch.setattr(Graph, "record", lambda graph, body: self.record(graph, body))

    def record(self, graph, body):
        self.count += 1
        if self.count < self.first:
            return self.plain(graph, body)

        def to_the_end():
            body()
            raise torch.OutOfMemoryError(MESSAGE)

        return self.plain(graph, to_the_end)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    on_cpu(monkeypatch)


def state(loop):
    """All that a recording must leave alone."""
    tensors = [*loop.parameters(), *loop.buffers(), *[p.grad for p in loop.parameters()]]
    return [torch.get_rng_state(), *[None if x is None else x.detach().clone() for x in tensors]]


def unchanged(loop, before):
    for a, b in zip(state(loop), before, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def images(seed):
    return batch(seed, size=(1, 8, 8))


@pytest.mark.parametrize("first", [1, 2], ids=["loss", "gradient"])
def test_asked_for_by_name(monkeypatch, first):
    plain, loop = pair(name="norm", capture=True)
    for k in range(CALLS - 1):
        same(gradients(plain, images(k)), gradients(loop, images(k)))
    with monkeypatch.context() as patched:
        Full(patched, first)
        before = state(loop)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"^capture: {TOLD}"):
                loop(*images(0))
            unchanged(loop, before)
    # There is memory again, and the next call is recorded.
    for k in range(3):
        same(gradients(plain, images(k)), gradients(loop, images(k)))
    assert [x.recording is not None for x in loop.recorder._known.values()] == [True]


@pytest.mark.parametrize("first", [1, 2], ids=["loss", "gradient"])
def test_without_being_asked(monkeypatch, first):
    plain, loop = pair(name="norm")
    Full(monkeypatch, first)

    def call(loop, k):
        out = loop(*images(k))
        loop.zero_grad(set_to_none=True)
        out.loss.sum().backward()
        return out, [p.grad for p in loop.parameters()]

    for k in range(CALLS - 1):
        same(call(plain, k), call(loop, k))
    with pytest.warns(
        UserWarning, match="^fastkfo: calls run without CUDA graphs: " + TOLD
    ) as told:
        same(call(plain, 0), call(loop, 0))
    assert [w.filename for w in told] == [__file__]
    with no_warnings():
        for k in range(3):
            same(call(plain, k), call(loop, k))
    assert "cannot be recorded: CUDA out of memory" in loop.recorder.why_not
    for a, b in zip(plain.buffers(), loop.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("capture", [True, "auto"])
def test_earlier_recordings_go_on(monkeypatch, capture):
    plain, loop = pair(capture=capture)
    for k in range(CALLS):
        gradients(loop, batch(k))
    made = Graph.made
    with monkeypatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Full(patched)
        for k in range(CALLS):
            refused = capture is True and k == CALLS - 1
            with pytest.raises(RuntimeError) if refused else nullcontext():
                loop(*batch(k, tasks=2))
    assert Graph.made == made + 1
    for k in range(3):
        same(gradients(plain, batch(k)), gradients(loop, batch(k)))
    assert Graph.made == made + 1  # it was replayed


class Fails(nn.Module):
    """A layer, a loss or a transform without memory for all tasks at once."""

    def __init__(self):
        super().__init__()
        self.out_of_memory = False

    def forward(self, x, y=None):
        if self.out_of_memory and is_batchedtensor(x):
            raise torch.OutOfMemoryError(MESSAGE)
        return x if y is None else (x - F.one_hot(y, 5)).square().mean()


@pytest.mark.parametrize("backend", ["auto", "batched"])
@pytest.mark.parametrize("of", ["model", "loss", "transform"])
def test_an_inner_loop_without_memory_is_no_loop_over_tasks(of, backend):
    """What vmap refuses runs task after task, for ever; memory says nothing about the model."""
    fails, ours = Fails(), learner("norm")
    if of == "model":
        ours.module.append(fails)
    elif of == "transform":
        ours = fastkfo.algorithms.GBML(ours.module, lambda _: fails, lr=0.1)
    loss = fails if of == "loss" else F.cross_entropy
    loop = fastkfo.InnerLoop(ours, loss, 2, backend=backend)
    with no_warnings():
        want = loop(*images(0)).loss
        before = state(loop)
        fails.out_of_memory = True
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            loop(*images(0))
        unchanged(loop, before)
        fails.out_of_memory = False
        torch.testing.assert_close(loop(*images(0)).loss, want)
    assert loop.why_one_by_one() is None


def test_a_batched_learner_without_memory():
    fails, ours = Fails(), learner("norm")
    ours.module.append(fails)
    clone = ours.clone(tasks=3)
    x_s, y_s, *_ = images(0)
    loss = fastkfo.per_task(F.cross_entropy)
    before = state(ours)
    fails.out_of_memory = clone.module[-1].out_of_memory = True
    with no_warnings(), pytest.raises(torch.OutOfMemoryError):
        clone(x_s)
    unchanged(ours, before)
    clone.module[-1].out_of_memory = False
    with no_warnings():
        clone.adapt(loss(clone(x_s), y_s))
    assert clone._model.way != "each"


def test_a_step_of_ones_own(monkeypatch):
    model, twin = nn.Linear(4, 2), None
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, twin)]

    def step(model, optimizer, x):
        optimizer.zero_grad(set_to_none=False)
        loss = (model(x) * torch.rand(2)).square().sum()
        loss.backward()
        optimizer.step()
        return loss

    kinds = [(torch.Size([3, 4]), torch.float32, torch.device("cpu"))]
    replay = Captured(lambda x: step(model, optimizers[0], x), kinds, Graph)

    def both(x):
        now = torch.get_rng_state()
        want = step(twin, optimizers[1], x).detach()
        torch.set_rng_state(now)
        torch.testing.assert_close(replay(x), want)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)
            torch.testing.assert_close(p.grad, q.grad)

    for k in range(CALLS - 1):
        both(torch.full((3, 4), 1.0 + k))
    momenta = [x["momentum_buffer"] for x in optimizers[0].state.values()]
    grads = [p.grad for p in model.parameters()]
    monkeypatch.setattr(Graph, "buffers", [*model.parameters(), *grads, *momenta])
    with monkeypatch.context() as patched:
        Full(patched)
        before = state(model)
        told = "^capture: the step cannot be recorded: CUDA out of memory. Tried .* GiB.$"
        for _ in range(2):
            with pytest.raises(RuntimeError, match=told) as caught:
                replay(torch.ones(3, 4))
            assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
            unchanged(model, before)
    for k in range(3):
        both(torch.full((3, 4), 2.0 + k))


def test_a_graph_that_failed_is_replaced(monkeypatch):
    """One that owns part of a recording takes no other."""
    made = []

    class OfCuda:
        def __init__(self):
            self.owns = False
            made.append(self)

    class Recording:
        def __init__(self, graph, pool, stream, capture_error_mode):
            assert not graph.owns
            graph.owns, self.stream, self.pool = True, stream, pool
            seen.append((stream, pool))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    seen = []
    pools = iter(range(10))
    cuda = SimpleNamespace(
        CUDAGraph=OfCuda, Stream=lambda _: "stream", graph_pool_handle=lambda: next(pools),
        graph=Recording, device=lambda _: nullcontext(), current_stream=lambda _: "current",
        set_stream=lambda x: set_streams.append(x),
    )  # fmt: skip
    set_streams = []
    generator = mock.Mock()
    monkeypatch.setattr(graphs, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(graphs, "generator_of", lambda _: generator)
    graph = graphs.Graph(torch.device("cuda"))

    def fails():
        raise torch.OutOfMemoryError(MESSAGE)

    with pytest.raises(torch.OutOfMemoryError):
        graph.record(fails)
    generator.graphsafe_set_state.assert_called_once_with(generator.clone_state.return_value)
    assert graph.record(lambda: 3) == 3
    assert seen == [("stream", 0), ("stream", 1)]
    assert set_streams == ["current"] * 2
    assert made[0] is not graph._graph
