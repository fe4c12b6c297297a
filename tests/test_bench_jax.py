"""The JAX peer against learn2learn, and what happens when its process does not do as it should."""

import os
import signal
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import gate
from bench.peers import jax_peer, peer
from bench.peers.jax_peer import JaxPrepared
from bench.peers.jax_plan import plan
from bench.problem import Problem
from bench.workloads import METHODS, WORKLOADS, Workload, episodes, mean_of_pixels
from fastkfo.nn import Flatten, Lambda
from fastkfo.vision import models

jax = pytest.importorskip("jax")
jax_worker = pytest.importorskip("bench.peers.jax_worker")

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called

PEER = peer("jax")


def small(workload, method, width, steps=2, dtype=torch.float64):
    return Problem.named(workload, method, tasks=2, steps=steps, width=width, dtype=dtype)


def assert_agrees(problem):
    assert PEER.missing() is None
    assert PEER.declines(problem) is None
    prepared = PEER.prepare(problem)
    found = prepared.gradient()
    prepared.close()
    difference = gate.difference(found, peer("learn2learn").prepare(problem).gradient())
    assert difference.passes, difference.text()
    assert all(g.dtype == problem.dtype for g in found.values())


@pytest.mark.parametrize("method", METHODS)
def test_head_agrees(method):
    assert_agrees(small("anil-head", method, width=6, steps=3))


@pytest.mark.parametrize(
    ("workload", "method", "width", "steps"),
    [
        ("sine-mlp", "kfo-adapt", 4, 2),
        ("omniglot-fc", "meta-sgd", 8, 1),
        ("omniglot-cnn", "maml", 2, 1),
        ("cifarfs-cnn-2", "kfo", 2, 1),
        ("anil-cifarfs", "kfo", 2, 1),
    ],
)
def test_network_agrees(workload, method, width, steps):
    assert_agrees(small(workload, method, width, steps))


def test_max_pool_agrees(monkeypatch):
    """CNN4 on images whose border the pooling leaves out."""
    cnn4 = Workload(
        "small",
        lambda width: models.CNN4(5, hidden_size=width, layers=2, embedding_size=width),
        episodes(1, 3, 18, 17),
        F.cross_entropy,
        lr=0.1,
        tasks=2,
        width=2,
    )
    monkeypatch.setitem(WORKLOADS, "small", cnn4)
    assert_agrees(small("small", "meta-curvature", width=2, steps=1))


def block(**options):
    return models.ConvBlock(2, 3, 3, **options)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 3, bias=False), (5, 4)),
        (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(0, 1), bias=False), (4, 2, 8, 7)),
        (nn.Conv2d(2, 3, 1, stride=3), (4, 2, 6, 8)),
        (nn.BatchNorm1d(4, affine=False), (5, 4)),
        (nn.BatchNorm2d(3, eps=0.1), (5, 3, 4, 2)),
        (nn.MaxPool2d((2, 3)), (2, 3, 5, 8)),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), (2, 3, 2)),
        (block(max_pool=True), (3, 2, 7, 6)),
        (block(max_pool=False), (3, 2, 7, 6)),
        (models.CNN4Backbone(hidden_size=3, layers=2), (3, 3, 18, 17)),
        (models.CNN4(5, hidden_size=2, embedding_size=2), (3, 3, 17, 16)),
        (models.OmniglotFC(12, 5, sizes=[6, 4]), (4, 1, 3, 4)),
        (models.OmniglotCNN(5, hidden_size=3), (4, 784)),
        (nn.Sequential(Lambda(mean_of_pixels), Flatten()), (4, 2, 3, 3)),
    ],
)
def test_plan_computes_what_the_module_does(module, shape):
    parameters = {name: p.detach().normal_() for name, p in module.named_parameters()}
    layers = plan(module, {id(p): name for name, p in module.named_parameters()})
    x = torch.randn(shape)
    state = {name: p.numpy() for name, p in parameters.items()}
    found = jax.jit(partial(jax_worker.forward, layers))(state, x.numpy())
    torch.testing.assert_close(torch.from_numpy(np.array(found)), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"learner": lambda width: nn.Sequential(nn.Linear(6, 5), nn.Tanh())}, "Tanh"),
        ({"learner": lambda width: nn.Sequential(nn.BatchNorm1d(6).eval())}, "running statistics"),
        ({"learner": lambda width: nn.Sequential(Lambda(abs), nn.Linear(6, 5))}, "Lambda"),
        ({"features": lambda width: nn.Sequential(nn.GELU())}, "GELU"),
        ({"loss": F.l1_loss}, "l1_loss"),
    ],
)
def test_declines_what_it_cannot_translate(monkeypatch, options, reason):
    monkeypatch.setitem(WORKLOADS, "anil-head", replace(WORKLOADS["anil-head"], **options))
    assert reason in PEER.declines(small("anil-head", "maml", width=6))


@pytest.mark.parametrize("options", [{"stride": 1}, {"padding": 1}, {"ceil_mode": True}])
def test_unknown_pooling_has_no_plan(options):
    with pytest.raises(TypeError, match="MaxPool2d"):
        plan(nn.MaxPool2d(2, **options), {})


def test_declines_cuda_without_a_backend(monkeypatch):
    monkeypatch.setattr(jax_peer, "GPU_PLUGINS", ("no_such_module",))
    problem = replace(small("anil-head", "maml", width=6), device="cuda")
    assert "CUDA" in PEER.declines(problem)


@pytest.fixture(scope="module")
def prepared():
    made = PEER.prepare(small("anil-head", "maml", width=6, dtype=torch.float32))
    yield made
    made.close()


def test_measures(prepared):
    assert prepared.compile_s > 0
    assert 0 < prepared.seconds() < 10
    assert prepared.launches() > 0
    assert prepared.peak_bytes() is None or prepared.peak_bytes() >= 0


def test_worker_has_no_torch(prepared):
    assert "jax" in prepared.modules()
    assert "torch" not in prepared.modules()


def test_error_in_the_worker_is_reported_and_survived(prepared):
    with pytest.raises(RuntimeError, match="no_such_command"):
        prepared._ask("no_such_command")
    assert prepared.seconds() > 0


@pytest.fixture
def job():
    return jax_peer._job(small("anil-head", "maml", width=6))


def test_error_while_compiling_is_reported(job):
    state = {name: np.ones((2, 2)) for name in job["state"]}
    with pytest.raises(RuntimeError, match=r"compile: TypeError.*\b2\b"):
        JaxPrepared(job | {"state": state}, timeout_s=60)


def test_killed_worker_is_an_error(job):
    prepared = JaxPrepared(job, timeout_s=60)
    os.kill(prepared.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="died with exit status -9"):
        prepared.gradient()
    with pytest.raises(RuntimeError, match="closed"):
        prepared.seconds()


def test_slow_worker_is_killed(job):
    prepared = JaxPrepared(job, timeout_s=60)
    os.kill(prepared.pid, signal.SIGSTOP)
    prepared.timeout_s = 0.2
    with pytest.raises(TimeoutError, match=r"gradient: killed after 0\.2 s"):
        prepared.gradient()
    assert_gone(prepared.pid)


def test_worker_ends_with_its_parent():
    process, connection, output = jax_peer._start("cpu")
    process.stdin.close()  # as the parent's end would
    assert process.wait(timeout=30) == 0
    connection.close()
    output.close()


def test_dropped_worker_ends(job):
    prepared = JaxPrepared(job, timeout_s=60)
    pid = prepared.pid
    del prepared
    assert_gone(pid)


def test_counts_what_xla_executes():
    hlo = """HloModule m
%fused (p: f32[2]) -> f32[2] {
  ROOT %negate.1 = f32[2]{0} negate(f32[2]{0} %p)
}

ENTRY %main.1 (a: f32[2]) -> (f32[2], f32[]) {
  %a = f32[2]{0} parameter(0)
  %constant.1 = f32[] constant(0)
  %fusion.1 = (f32[2]{0}, /*index=1*/f32[2]{0}) fusion(%a), kind=kLoop, calls=%fused
  %get-tuple-element.1 = f32[2]{0} get-tuple-element(%fusion.1), index=0
  %b.2 = f32[1,2]{1,0} bitcast(%get-tuple-element.1)
  %dot = f32[] dot(%a, %a), lhs_contracting_dims={0}, metadata={op_name="jit(f)/dot"}
  ROOT %t = (f32[2]{0}, f32[]) tuple(%get-tuple-element.1, %dot)
}
"""
    assert jax_worker.executed(hlo) == 2


def assert_gone(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} is still there")
