"""Recorded inner loops: when they are recorded, and that replays are the calls they stand for.

The graphs are a stand-in that runs on a CPU; tests/test_inner_loop_capture_gpu.py has CUDA's.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.inner_loop import recorder
from tests.batches import no_warnings
from tests.graphs_on_cpu import Graph
from tests.models import assert_close
from tests.recorded_loops import (
    CALLS,
    batch,
    gradients,
    learner,
    on_cpu,
    pair,
    recorded,
    same,
)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    on_cpu(monkeypatch)


@pytest.mark.parametrize("backend", ["batched", "auto"])
@pytest.mark.parametrize("needs", [False, True], ids=["data", "data with gradients"])
def test_replays_equal_calls(backend, needs):
    plain, loop = pair(backend=backend)
    for k in range(CALLS + 3):
        data = batch(k, needs=needs)
        weight = torch.tensor([1.0, 2.0, -0.5]) * (k + 1)
        same(gradients(plain, data, weight), gradients(loop, data, weight))
        assert Graph.made == (0 if k + 1 < CALLS else 2)


def test_results_outlive_the_next_replay():
    plain, loop = pair()
    for k in range(CALLS):
        gradients(loop, batch(k))
    first = gradients(loop, batch(10))
    gradients(loop, batch(11))
    same(gradients(plain, batch(10)), first)


def test_gradients_in_any_order():
    plain, loop = pair(name="norm")
    data = [batch(k, size=(1, 8, 8)) for k in range(6)]
    for k in range(CALLS):
        gradients(plain, data[k])
        gradients(loop, data[k])
    found = []
    for each in (plain, loop):
        each.zero_grad()
        losses = [each(*x).loss for x in data[3:]]
        for k in (1, 0, 2):
            (losses[k] * (k + 1)).sum().backward()
        found.append([p.grad for p in each.parameters()] + [x.double() for x in each.buffers()])
    for a, b in zip(*found, strict=True):
        assert_close(b, a, tol=1e-12)


def test_a_graph_of_the_gradient_is_not_recorded():
    plain, loop = pair()
    for k in range(CALLS):
        gradients(loop, batch(k))
    found = []
    for each in (plain, loop):
        params = list(each.parameters())
        once = torch.autograd.grad(each(*batch(7)).loss.sum(), params, create_graph=True)
        twice = torch.autograd.grad(sum([x.square().sum() for x in once]), params)
        found.append([*once, *twice])
    for a, b in zip(*found, strict=True):
        assert_close(b.detach(), a.detach(), tol=1e-10)


def test_batch_norms_statistics():
    plain, loop = pair(name="norm")
    for k in range(CALLS + 2):
        data = batch(k, size=(1, 8, 8))
        same(gradients(plain, data), gradients(loop, data))
    for a, b in zip(plain.buffers(), loop.buffers(), strict=True):
        assert_close(b.double(), a.double(), tol=1e-12)


def test_an_optimizer_moves_what_graphs_read():
    plain, loop = pair()
    steps = [torch.optim.Adam(x.parameters(), 0.01) for x in (plain, loop)]
    for k in range(CALLS + 3):
        same(gradients(plain, batch(k)), gradients(loop, batch(k)))
        for x in steps:
            x.step()


def test_without_gradients():
    plain, loop = pair()
    with torch.no_grad():
        for k in range(CALLS + 1):
            out = loop(*batch(k))
    assert Graph.made == 1
    assert_close(out.loss, plain(*batch(CALLS)).loss.detach(), tol=1e-12)
    with torch.inference_mode():
        for _ in range(2):
            again = loop(*batch(CALLS))
    assert torch.equal(again.loss, out.loss)
    x_s, y_s, x_q, _ = batch(0)
    with torch.no_grad():
        for _ in range(CALLS + 1):
            out = loop(x_s, y_s, x_q)
    assert out.loss is None
    assert_close(out.predictions, plain(x_s, y_s, x_q).predictions, tol=1e-12)


def test_step_weights():
    plain, loop = pair()
    for k in range(CALLS + 2):
        weights = torch.tensor([0.25 * k, 1.0]).double()
        same(
            gradients(plain, batch(k), step_weights=weights),
            gradients(loop, batch(k), step_weights=weights),
        )


@pytest.mark.parametrize(
    "change",
    [
        lambda loop: setattr(loop.learner, "lr", 0.3),
        lambda loop: loop.eval(),
        lambda loop: loop.learner.module[0].weight.requires_grad_(False),
        lambda loop: setattr(loop.learner.module[0].weight, "data", torch.ones(6, 8).double()),
        lambda loop: loop.learner.module.__setitem__(1, nn.Tanh()),
    ],
    ids=["lr", "eval", "frozen", "data", "layer"],
)
def test_what_changes_is_noticed(change):
    plain, loop = pair()
    for k in range(CALLS):
        gradients(loop, batch(k))
    for each in (plain, loop):
        change(each)
    for k in range(CALLS + 1):
        a, b = plain(*batch(k)), loop(*batch(k))
        assert_close(b.loss.detach(), a.loss.detach(), tol=1e-12)
    assert Graph.made == 4


def test_shapes_and_steps_are_recorded_apart():
    plain, loop = pair()
    for _ in range(CALLS + 1):
        for tasks in (2, 3):
            for steps in (1, 2):
                data = batch(tasks, tasks)
                same(gradients(plain, data, steps=steps), gradients(loop, data, steps=steps))
    assert Graph.made == 8
    gradients(loop, batch(4, 4))
    assert len(loop.recorder._known) == recorder.MOST


def test_a_changed_parameter_is_noticed_before_its_gradient():
    _, loop = pair()
    for k in range(CALLS):
        gradients(loop, batch(k))
    loss = loop(*batch(0)).loss.sum()
    with torch.no_grad():
        next(loop.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Counting(nn.Module):
    """A model of somebody's own."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(8, 5), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x)


def test_what_may_do_something_else_is_not_recorded():
    model = fastkfo.algorithms.MAML(Counting().double(), 0.1)
    loop = recorded(fastkfo.InnerLoop(model, F.cross_entropy, 2))
    for k in range(CALLS):
        loop(*batch(k))
    assert Graph.made == 0
    assert "Counting may depend" in loop.recorder.why_not
    model = learner()
    loop = recorded(fastkfo.InnerLoop(model, lambda p, y: F.cross_entropy(p, y), 2))
    for k in range(CALLS):
        loop(*batch(k))
    assert "loss, a function of its own" in loop.recorder.why_not
    # Asked for, it is, as long as its attributes stay as they are.
    loop = recorded(fastkfo.InnerLoop(model, lambda p, y: F.cross_entropy(p, y), 2, capture=True))
    for k in range(CALLS):
        loop(*batch(k))
    assert Graph.made == 2


def test_a_refusal_is_kept_and_told(monkeypatch):
    def calls(loop, k):
        out = loop(*batch(k))
        loop.zero_grad()
        out.loss.sum().backward()
        return out, [p.grad.clone() for p in loop.parameters()]

    def refuse(self, body):
        body()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Graph, "record", refuse)
    plain, loop = pair()
    for k in range(CALLS + 2):
        told = pytest.warns(UserWarning, match="without CUDA graphs: the inner loop cannot")
        with told if k == CALLS - 1 else no_warnings():
            same(calls(plain, k), calls(loop, k))
    assert Graph.made == 1
    assert "cannot be recorded: operation not permitted" in loop.recorder.why_not
    _, loop = pair(capture=True)
    for k in range(CALLS - 1):
        calls(loop, k)
    with pytest.raises(RuntimeError, match="capture: the inner loop cannot be recorded"):
        loop(*batch(0))


@pytest.mark.parametrize(
    "options", [{"memory": "checkpoint"}, {"chunk_size": 2}], ids=["checkpoint", "chunks"]
)
def test_what_cannot_be_recorded(options):
    _, loop = pair(**options)
    for k in range(CALLS):
        gradients(loop, batch(k))
    assert Graph.made == 0
    _, loop = pair(capture=True, **options)
    with pytest.raises(ValueError, match="capture: expected a call that can be recorded"):
        loop(*batch(0))


def test_cuda_tensors_are_asked_for(monkeypatch):
    monkeypatch.setattr(recorder, "DEVICE", "cuda")
    loop = fastkfo.InnerLoop(learner(), F.cross_entropy, 2, capture=True)
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        loop(*batch(0))


def test_copies_record_for_themselves():
    _, loop = pair()
    for k in range(CALLS):
        gradients(loop, batch(k))
    twin = copy.deepcopy(loop)
    assert len(twin.recorder._known) == 0
    assert twin.recorder is not loop.recorder


@pytest.mark.parametrize("ours", [True, False], ids=["of the package", "somebody's"])
def test_functions_in_a_model(ours):
    model = fastkfo.vision.models.OmniglotCNN(5, hidden_size=4)  # has Lambdas of its own
    if not ours:
        model = nn.Sequential(model, fastkfo.nn.Lambda(lambda x: x))
    loop = fastkfo.InnerLoop(fastkfo.algorithms.MAML(model, 0.1), F.cross_entropy, 1)
    reason = recorder.of_loop(loop)
    assert reason is None if ours else "Lambda may depend" in reason
