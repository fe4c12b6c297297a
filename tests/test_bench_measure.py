"""How the benchmark measures; no reading itself is tested."""

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench import clock, dispatches, measure, memory, row, table
from bench.problem import Problem
from tests.bench_rows import RATES

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called


def test_rounds_are_interleaved():
    order = []
    runs = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    samples = measure.interleaved(runs, rounds=12)
    rounds = [tuple(order[k : k + 3]) for k in range(0, 36, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({names[0] for names in rounds}) == 3  # nobody is always first
    assert len({(a, b) for a, b in pairwise(order) if a != b}) == 6
    assert {s for taken in samples.values() for s in taken} == {float(k) for k in range(1, 37)}


def test_ratios_are_pair_by_pair():
    # A machine that is twice as slow in every other round: the ratio does not see it.
    found = measure.speedup([1.0, 2.0, 1.0, 2.0], baseline=[3.0, 6.0, 3.0, 6.0])
    assert found == {"median": 3.0, "q1": 3.0, "q3": 3.0, "unstable": False}
    assert measure.speedup([1.0, 2.0, 1.0, 2.0], baseline=[3.0] * 4)["unstable"]


def test_rounds_for():
    assert measure.rounds_for(10, 1) == 10
    assert measure.rounds_for(0, 1) == measure.LEAST
    assert measure.rounds_for(0, 10) == measure.FEW  # one of them is long enough
    assert measure.rounds_for(-5, 0.1) == 20  # whatever the gate took
    assert measure.rounds_for(10, 0) == measure.MOST
    assert measure.rounds_for(10, 1, most=2) == 2


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux tells")
def test_own_work_is_not_elsewhere(monkeypatch):
    # Of two cores, 1.5 busy; this process 0.9 and its worker 0.4 of them.
    readings = iter([(0.0, 0.0, 0.0), (10.0, 15.0, 13.0)])
    monkeypatch.setattr(clock.Elsewhere, "_read", lambda self: next(readings))
    assert clock.Elsewhere().cores() == pytest.approx(0.2)


def test_work_elsewhere_is_measured_and_no_ratio_then_stable(monkeypatch):
    monkeypatch.setattr(clock.Elsewhere, "cores", lambda self: 0.5)
    problem = Problem.named("anil-head", "maml", tasks=1, steps=1)
    found = row.read(problem, ["learn2learn"], 0.0, RATES)
    assert found["busy_elsewhere"] == 0.5
    assert found["peers"]["learn2learn"]["speedup"]["unstable"]
    assert any("0.5 cores were busy" in line for line in table.remarks([found]))


def test_seconds_and_cpu_are_read():
    assert clock.seconds(lambda: None, "cpu") >= 0
    assert clock.Elsewhere([os.getpid()]).cores() is not None


def test_times():
    assert measure.times([1e-3, 2e-3, 3e-3]) == pytest.approx(
        {"median_ms": 2.0, "q1_ms": 1.5, "q3_ms": 2.5}
    )


def test_dispatches_count_what_computes():
    x = torch.ones(3, 3)
    assert dispatches.count(lambda: x.T.contiguous(), "cpu") == 1  # the view is free
    assert dispatches.count(lambda: x @ x + x, "cpu") == 2
    assert dispatches.count(lambda: torch.vmap(torch.sin)(x), "cpu") == 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells")
def test_peak_memory():
    def run():
        held = torch.ones(8 << 20)  # 32 MiB, and as much again for a moment
        return (held + 1).sum()

    for _ in range(2):  # the second time nothing freed may be reused unseen
        assert memory.peak_bytes(run) == pytest.approx(64 << 20, rel=0.2)
    assert memory.peak_bytes(lambda: None) < 4 << 20
