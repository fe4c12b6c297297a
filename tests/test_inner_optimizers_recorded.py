"""What `explain` says of inner optimizers, and that recorded calls know theirs."""

import copy

import pytest
import torch.nn.functional as F

import fastkfo
from fastkfo.optim.inner import SGD, Adam, InnerOptimizer
from tests.batches import batch
from tests.graphs_on_cpu import Graph
from tests.inner_optimizer_cases import inner_loop
from tests.inner_optimizer_cases import learner as with_optimizer
from tests.recorded_loops import CALLS, gradients, learner, on_cpu, pair, recorded, same
from tests.recorded_loops import batch as recorded_batch


def lines(ours, capsys, steps=3, **options):
    fastkfo.explain(inner_loop(ours, steps, **options), *batch("mlp", 2)[:2])
    return capsys.readouterr().out.splitlines()


def test_explain(capsys):
    ours = with_optimizer(steps=3, inner_optimizer=Adam(), clip_grad_norm=0.5)
    said = lines(ours, capsys)
    assert "fused: no, inner_optimizer is Adam(betas=(0.9, 0.999), eps=1e-08)" in said
    assert "clipping: every task's gradients, to a norm of 0.5" in said
    assert (
        "inner optimizer: Adam(betas=(0.9, 0.999), eps=1e-08), every task with a state of its own"
    ) in said
    assert "lr: of every step its own, up to 3" in said
    said = lines(with_optimizer(steps=3, shared=True, clip_grad_value=0.5), capsys)
    assert "fused: no, gradients are clipped" in said
    assert "clipping: every number of a gradient, to ±0.5" in said
    assert "lr: of every step its own, up to 3, shared" in said
    said = lines(with_optimizer(steps=3), capsys)
    assert "fused: no, lr has a rate for every step" in said
    assert not any(x.startswith(("clipping", "inner")) for x in lines(with_optimizer(), capsys))


@pytest.fixture
def stand_in(monkeypatch):
    on_cpu(monkeypatch)


@pytest.mark.usefixtures("stand_in")
def test_recorded_calls():
    loops = pair(own={"inner_optimizer": Adam(eps=1e-3)})
    for k in range(CALLS + 2):
        same(*[gradients(loop, recorded_batch(k)) for loop in loops])
    assert Graph.made == 2


@pytest.mark.usefixtures("stand_in")
def test_another_optimizer_is_recorded_anew():
    loops = pair(own={"inner_optimizer": Adam(eps=1e-3)})
    for optimizer in (Adam(eps=1e-3), Adam(eps=1e-2), SGD(momentum=0.5), None):
        for loop in loops:
            loop.learner.inner_optimizer = optimizer
        for k in range(CALLS + 1):
            same(*[gradients(loop, recorded_batch(k)) for loop in loops])
    assert Graph.made == 8
    for loop in loops:
        loop.learner.clip_grad_norm = 0.1
    same(*[gradients(loop, recorded_batch(0)) for loop in loops])


@pytest.mark.usefixtures("stand_in")
def test_rates_per_step_are_recorded():
    plain = learner(allow_nograd=True)
    lr = fastkfo.optim.PerStepLR(plain.module, steps=2, init=0.1)
    plain = fastkfo.algorithms.GBML(plain.module, plain.transform, lr=lr).double()
    other = copy.deepcopy(plain)
    loops = (
        fastkfo.InnerLoop(plain, F.cross_entropy, 2, backend="batched", capture=False),
        recorded(fastkfo.InnerLoop(other, F.cross_entropy, 2, backend="batched")),
    )
    for k in range(CALLS + 2):
        same(*[gradients(loop, recorded_batch(k)) for loop in loops])
    assert Graph.made == 2


class Sign(InnerOptimizer):
    """A user's own."""

    def direction(self, update, buffers, count):
        return update.sign(), ()


@pytest.mark.usefixtures("stand_in")
def test_an_optimizer_of_a_users_own_is_not_recorded_by_itself():
    (_, loop) = pair(own={"inner_optimizer": Sign()})
    for k in range(CALLS + 1):
        loop(*recorded_batch(k))
    assert "Sign may depend on what a graph would not see" in loop.recorder.why_not
    assert not Graph.made


@pytest.mark.usefixtures("stand_in")
def test_a_learner_that_has_taken_steps_is_not_recorded():
    loop = pair(own={"inner_optimizer": Adam()})[1]
    x_s, y_s, *_ = recorded_batch(0)
    clone = loop.learner.clone()
    clone.adapt(F.cross_entropy(clone(x_s[0]), y_s[0]))
    fastkfo.utils.detach_module(clone, keep_requires_grad=True)
    other = recorded(fastkfo.InnerLoop(clone, F.cross_entropy, 2, backend="batched"))
    for k in range(CALLS + 1):
        other(*recorded_batch(k))
    assert "taken steps of its inner optimizer" in other.recorder.why_not
