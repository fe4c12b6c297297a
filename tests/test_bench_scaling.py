"""The benchmark's sweeps."""

import types
from pathlib import Path

import pytest

from bench import row, scaling
from bench.peers import base, peer, vmap_peer
from bench.problem import Problem
from bench.records import Record
from tests.bench_rows import invoke, only_record

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called

__all__ = ["invoke"]


def test_slope():
    points = [(2.0**k, 5 + 3 * 2.0**k) for k in range(10)]
    assert scaling.slope(points) == pytest.approx(1, abs=0.05)
    assert scaling.slope([(k, k**2) for k in range(1, 6)]) == pytest.approx(2)
    assert scaling.slope([(1, 1), (2, 2)]) is None


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setitem(scaling.AXES, "tasks", ((1, 2, 3, 4), 1))
    monkeypatch.setitem(scaling.AXES, "steps", ((1, 2), 1))


def swept(axis, names, method="maml", until=float("inf"), **sizes):
    problem = Problem.named("anil-head", method, width=8, **sizes)
    return list(scaling.read(problem, axis, names, until))


def test_sweep(short, monkeypatch):
    monkeypatch.setattr(scaling, "_too_much", lambda points, x, power, device, longest_s: (
        "would not fit" if x == 4 else None))  # fmt: skip
    found = swept("tasks", ["learn2learn", "torchopt", "vmap"], steps=1)[-1]
    vmap = found["peers"]["vmap"]
    assert [point["x"] for point in vmap["points"]] == [1, 2, 3]
    assert all(point["gated"] for point in vmap["points"])
    assert vmap["stopped"] == "would not fit"
    assert vmap["slope"] is not None
    assert "would not fit" in scaling.cells(vmap)[2]
    assert scaling.table([found]).row_count == 4


def test_sweep_is_on_disk_after_every_point(invoke, tmp_path, short, monkeypatch):
    kept = []
    monkeypatch.setattr(Record, "replace", lambda self, row: kept.append(row) or self._write())
    result = invoke("--sweep", "steps", "--workload", "anil-head", "--method", "maml", "--peer",
                    "vmap", "--width", "8")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert kept
    ((kept_row,),) = [run["rows"] for run in only_record(tmp_path)]
    assert [point["x"] for point in kept_row["peers"]["vmap"]["points"]] == [1, 2]


def test_sweep_ends_who_fails_at_reading_memory(short, monkeypatch):
    def fail(self):
        raise MemoryError("no more")

    monkeypatch.setattr(base.InProcess, "peak_bytes", fail)
    entry = swept("steps", ["learn2learn"])[-1]["peers"]["learn2learn"]
    assert entry["points"] == []
    assert "no more" in entry["stopped"]


def test_sweep_out_of_time(short):
    found = swept("tasks", ["learn2learn"], until=0.0, steps=1)[-1]
    assert found["peers"]["learn2learn"]["stopped"] == "out of time before 1"


@pytest.mark.parametrize(
    ("axis", "method", "old", "new"),
    [("tasks", "maml", ").sum()", ").mean()"), ("steps", "kfo-adapt", "f + lr**2", "f - lr**2")],
)
def test_sweep_gates_where_it_is_wrong(axis, method, old, new, short, monkeypatch):
    """At one task a mean is the sum, and in one step φ does not move: later points show it."""
    source = Path(vmap_peer.__file__).read_text()
    assert old in source
    wrong = types.ModuleType("wrong")
    exec(source.replace(old, new), vars(wrong))
    monkeypatch.setattr(row, "peer", lambda name: wrong.PEER if name == "vmap" else peer(name))
    found = swept(axis, ["learn2learn", "vmap"], method)[-1]["peers"]
    assert found["vmap"]["points"][0]["status"] == "ok"
    assert scaling.wrong(found["vmap"]).startswith("wrong by")
    assert scaling.wrong(found["learn2learn"]) is None


def test_sweep_ends_before_it_does_not_fit():
    def point(ms, size):
        return [{"x": 2, "median_ms": ms, "peak_bytes": size}]

    def why(points, device="cpu", longest_s=15.0):
        return scaling._too_much(points, 4, 1, device, longest_s)

    assert why([]) is None
    assert why(point(1.0, 1 << 20)) is None
    assert "a call would take about 40 s" in why(point(2e4, 0))
    assert "a call would take about 4 s" in why(point(2e3, 0), longest_s=3.0)
    assert "GiB" in why(point(1.0, 1 << 50))
    assert why(point(1.0, 1 << 50), "cuda") is None


def test_a_sweep_is_longer_on_a_gpu_and_its_calls_shorter():
    for axis, most in (("tasks", 4096), ("steps", 50)):
        assert max(scaling.values_of(axis, "cuda")[0]) == most
        assert max(scaling.values_of(axis, "cpu")[0]) < most
    assert scaling.values_of("width", "cuda") == scaling.AXES["width"]
    assert scaling.longest("learn2learn", "cuda") < scaling.longest("inner_loop", "cuda")
    assert scaling.longest("learn2learn", "cpu") == scaling.longest("inner_loop", "cpu")


def test_rounds_are_few_where_they_are_long():
    def points(ms):
        return [{"median_ms": 1e6}, {"median_ms": ms}]

    assert scaling._rounds([[], points(400.0), points(500.0)]) == scaling.ROUNDS
    assert scaling._rounds([[], points(600.0), points(500.0)]) == scaling.FEW_ROUNDS


def test_linear_from():
    flat_then_linear = [(x, max(64, x) * 1.0) for x in (1, 4, 16, 64, 256, 1024)]
    assert scaling.linear_from(flat_then_linear) == 64
    assert scaling.linear_from([(x, x**0.5) for x in (1, 4, 16)]) is None
    assert scaling.linear_from([(x, x) for x in (1, 4, 16)]) == 1
    assert scaling.linear_from([(1, 1.0), (2, 1.0), (4, 2.0)]) is None  # two points are noise
    assert scaling.linear_from([(1, 1.0)]) is None
    assert (
        "linear from 64"
        in scaling.cells({"points": [], "stopped": None, "slope": 1.0, "linear_from": 64})[1]
    )
