"""What is recorded is recorded before anything is timed; the graphs are a stand-in on a CPU."""

from dataclasses import replace

import pytest
import torch

from bench import gate, memory, row, table
from bench.peers import inner_loop_peer, peer
from bench.problem import Problem
from fastkfo.inner_loop import recorder
from tests.bench_rows import RATES
from tests.graphs_on_cpu import Graph

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called

PEERS = ["learn2learn", "inner_loop"]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(recorder, "DEVICE", "cpu")
    monkeypatch.setattr(inner_loop_peer, "Graph", Graph)
    monkeypatch.setattr(Graph, "made", 0)
    monkeypatch.setattr(Graph, "buffers", ())


def small(method="kfo"):
    return Problem.named("anil-head", method, tasks=2, steps=2, width=8)


def test_ready_is_replayed():
    prepared = peer("inner_loop").prepare(small())
    assert (prepared.recordings(), Graph.made) == (1, 2)  # of the losses, and of the gradient
    for _ in range(3):
        prepared.seconds()
    assert (prepared.recordings(), Graph.made) == (1, 2)


def test_replays_are_the_gradient():
    problem = replace(small(), dtype=torch.float64)
    found = peer("inner_loop").prepare(problem).gradient()
    oracle = peer("learn2learn").prepare(problem).gradient()
    assert gate.difference(found, oracle).passes


def test_nothing_is_recorded_within_the_rounds():
    entry = row.read(small(), PEERS, 0.0, RATES)["peers"]["inner_loop"]
    assert entry["recorded_meanwhile"] == 0
    assert entry["speedup"]["median"] > 0


def test_a_recording_within_the_rounds_makes_a_row_unstable(monkeypatch):
    monkeypatch.setattr(inner_loop_peer.Recorded, "_settle", lambda self: None)  # not warmed up
    found = row.read(small(), PEERS, 0.0, RATES)
    entry = found["peers"]["inner_loop"]
    # The gate's call and the one before the rounds: the third, which records, is in them.
    assert entry["recorded_meanwhile"] == 1
    assert entry["speedup"]["unstable"]
    assert any("recorded within the rounds" in line for line in table.remarks([found]))


def test_what_is_recorded_anew_every_time_is_refused(monkeypatch):
    monkeypatch.setattr(recorder.Recorder, "_unchanged", lambda self: False)
    with pytest.raises(RuntimeError, match=r"expected replays after \d+ calls"):
        peer("inner_loop").prepare(small())


def test_memory_is_that_of_the_recording(monkeypatch):
    taken = iter(range(100, 200))
    monkeypatch.setattr(memory, "peak_bytes", lambda run, device: (run(), next(taken))[1])
    prepared = peer("inner_loop").prepare(small())
    assert prepared.peak_bytes() == 100 + recorder.EAGER_CALLS


def test_adjoint_and_eager_peers_record_nothing():
    for one in (peer("inner_loop_adjoint"), inner_loop_peer.InnerLoop(capture=False)):
        prepared = one.prepare(small())
        for _ in range(recorder.EAGER_CALLS + 2):
            prepared.seconds()
        assert (prepared.recordings(), Graph.made) == (0, 0)


def test_out_of_memory_while_recording_is_said():
    error = RuntimeError("capture: the inner loop cannot be recorded: CUDA out of memory. Tried")
    assert row.failure(error)["status"] == "out of memory"
