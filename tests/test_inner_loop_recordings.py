"""Recorded inner loops where a graph and a call could come apart: repeated passes, changes, memory.

The graphs are a stand-in that runs on a CPU.
"""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from tests.graphs_on_cpu import Graph
from tests.models import assert_close
from tests.recorded_loops import (
    CALLS,
    batch,
    both,
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


def test_the_gradient_of_every_task_alone():
    def each(loop):
        loss, params = loop(*batch(7)).loss, list(loop.parameters())
        return [g for x in loss for g in torch.autograd.grad(x, params, retain_graph=True)]

    both(pair(), CALLS, each)


def test_dropout_in_a_pass_that_runs_again():
    loop = recorded(
        fastkfo.InnerLoop(
            fastkfo.algorithms.MAML(
                nn.Sequential(nn.Linear(8, 6), nn.Dropout(), nn.Linear(6, 5)).double(), 0.1
            ),
            F.cross_entropy, 2, backend="batched",
        )
    )  # fmt: skip
    for k in range(CALLS):
        gradients(loop, batch(k))
    params = list(loop.parameters())
    torch.manual_seed(1)
    want = torch.autograd.grad(loop(*batch(0)).loss.sum(), params)
    after = torch.get_rng_state()
    for create in (False, True):
        torch.manual_seed(1)
        loss = loop(*batch(0)).loss.sum()
        if not create:
            loop(*batch(1))
            torch.set_rng_state(after)
        found = torch.autograd.grad(loss, params, create_graph=create)
        assert torch.equal(torch.get_rng_state(), after)
        for a, b in zip(found, want, strict=True):
            assert_close(a.detach(), b, tol=1e-10)


def test_an_input_that_depends_on_another():
    def twice(loop):
        x_s, y_s, _, y_q = batch(7)
        x_s.requires_grad_()
        scale = next(loop.parameters())[0, 0]
        loss = loop(x_s, y_s, 2 * x_s * scale, y_q).loss.sum()
        return torch.autograd.grad(loss, [x_s, *loop.parameters()], create_graph=True)

    loops = pair()
    for loop in loops:
        for _ in range(CALLS):
            twice(loop)
    both(loops, 0, twice)


def test_a_changed_loop_has_no_graph_of_an_earlier_gradient():
    _, loop = pair()
    for k in range(CALLS):
        gradients(loop, batch(k))
    loss = loop(*batch(0)).loss.sum()
    loop.learner.lr = 0.9
    with pytest.raises(RuntimeError, match="changed since the forward pass"):
        torch.autograd.grad(loss, list(loop.parameters()), create_graph=True)


def test_a_changed_frozen_parameter_is_noticed_before_the_gradient():
    _, loop = pair()
    frozen = loop.learner.module[0].weight.requires_grad_(False)
    for k in range(CALLS):
        loop(*batch(k)).loss.sum().backward()
    loss = loop(*batch(0)).loss.sum()
    frozen.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_strides_are_part_of_what_is_recorded():
    loops = [
        fastkfo.InnerLoop(
            fastkfo.algorithms.MAML(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5)).double(), 0.1),
            F.cross_entropy, 2, backend="batched", capture=capture,
        )
        for capture in (False, "auto")
    ]  # fmt: skip
    loops[1].load_state_dict(loops[0].state_dict())
    recorded(loops[1])
    both(loops, CALLS, lambda loop: [loop(*batch(1)).loss])
    for loop in loops:
        weight = loop.learner.module[0].weight
        weight.data = weight.data.t()
    both(loops, CALLS, lambda loop: [loop(*batch(1)).loss])


@pytest.mark.parametrize("capture", ["auto", True])
@pytest.mark.parametrize("what", ["rate", "closure", "loss"])
def test_what_has_no_place_in_a_recording(what, capture):
    learner_, loss = learner(), F.cross_entropy
    if what == "rate":
        learner_.lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    elif what == "closure":
        t = torch.ones((), dtype=torch.float64, requires_grad=True)
        loss = lambda p, y: F.cross_entropy(p * t, y)  # noqa: E731
    else:

        def loss(p, y):
            if Graph.recording:
                raise ValueError("not while recording")
            return F.cross_entropy(p, y)

    loop = recorded(fastkfo.InnerLoop(learner_, loss, 2, backend="batched", capture=capture))
    calls = 0
    with (
        pytest.raises((ValueError, RuntimeError), match=r"capture: ")
        if capture is True
        else (contextlib.nullcontext())
    ):
        for k in range(CALLS + 1):
            loop(*batch(k))
            calls += 1
    assert calls == (CALLS + 1 if capture == "auto" else 0 if what == "rate" else CALLS - 1)
    assert all([x.recording is None for x in loop.recorder._known.values()])


def test_a_shallow_copy_records_for_itself():
    _, loop = pair()
    for k in range(CALLS):
        gradients(loop, batch(k))
    other = copy.copy(loop)
    other.options = {**loop.options, "first_order": True}
    plain = fastkfo.InnerLoop(
        loop.learner, F.cross_entropy, 2, first_order=True, backend="batched", capture=False
    )
    same(gradients(plain, batch(0)), gradients(other, batch(0)))


def test_a_batch_of_inference_mode():
    _, loop = pair()
    with torch.inference_mode():
        data = [x + 0 for x in batch(0)]
    for _ in range(CALLS + 1):
        gradients(loop, data)
    assert Graph.made == 2


def test_switches_of_the_newer_kind():
    _, loop = pair()
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        for k in range(CALLS):
            gradients(loop, batch(k))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    gradients(loop, batch(0))
    assert len(loop.recorder._known) == 2


def test_recordings_are_let_go():
    _, loop = pair()
    for k in range(CALLS):
        gradients(loop, batch(k))
    (known,) = loop.recorder._known.values()
    recording = weakref.ref(known.recording)
    del known
    loop.capture = False
    gradients(loop, batch(0))
    gc.collect()  # of the stand-in, which keeps the function
    assert recording() is None


def test_gradients_have_memory_of_their_own():
    _, loop = pair()
    for k in range(CALLS + 1):
        _, _ = gradients(loop, batch(k))
    params = list(loop.parameters())
    versions = [p.grad._version for p in params]
    params[0].grad.mul_(1)
    assert [p.grad._version for p in params[1:]] == versions[1:]
    assert len({p.grad.untyped_storage().data_ptr() for p in params}) == len(params)


def test_statistics_show_that_they_moved():
    _, loop = pair(name="norm")
    buffer = next(loop.buffers())
    for k in range(CALLS + 1):
        before = buffer._version
        gradients(loop, batch(k, size=(1, 8, 8)))
        assert buffer._version > before


def test_lists_of_tasks_are_not_recorded():
    _, loop = pair(capture=True)
    with pytest.raises(ValueError, match="x_s is a list of tasks"):
        loop(*[list(x) for x in batch(0)])


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 cannot compile an InnerLoop")
def test_compiled():
    plain, loop = pair()
    compiled = torch.compile(loop, backend="eager")
    for k in range(CALLS):
        assert_close(compiled(*batch(k)).loss.detach(), plain(*batch(k)).loss.detach(), tol=1e-12)
