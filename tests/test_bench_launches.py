"""`bench.launches`: what is counted and kept. No reading is tested."""

import pytest
import torch

from bench import launches
from bench.peers import inner_loop_peer
from bench.problem import Problem
from bench.records import load
from fastkfo.inner_loop import recorder
from tests.graphs_on_cpu import Graph

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called


def small(**sizes):
    return Problem.named("anil-head", "kfo", tasks=2, steps=2, width=8, **sizes)


def test_row():
    row = launches.read(small())
    assert row["why"] is None
    assert row["graph"] is None
    assert row["difference"] < 1e-5
    eager = row["launched"]["eager"]
    assert eager["operations"] > 0
    assert eager["us_per_operation"] == pytest.approx(
        1e3 * eager["median_ms"] / eager["operations"]
    )
    assert launches.line(row).startswith("anil-head kfo T2 K2: eager ")


def test_one_is_recorded_and_one_is_not(monkeypatch):
    monkeypatch.setattr(recorder, "DEVICE", "cpu")
    monkeypatch.setattr(inner_loop_peer, "Graph", Graph)
    monkeypatch.setattr(Graph, "made", 0)
    monkeypatch.setattr(Graph, "buffers", ())
    assert launches.read(small())["why"] is None
    assert Graph.made == 2  # of one instance: of its losses and of its gradient


def test_gradients_that_differ_are_refused(monkeypatch):
    right = inner_loop_peer.InProcess.gradient

    def wrong(self):
        wrong.calls += 1
        return {name: g * (2 if wrong.calls == 1 else 1) for name, g in right(self).items()}

    wrong.calls = 0
    monkeypatch.setattr(inner_loop_peer.InProcess, "gradient", wrong)
    row = launches.read(small())
    assert "gradients differ" in row["why"]
    assert row["launched"] == {}
    assert "gradients differ" in launches.line(row)


def test_nodes():
    found = launches.nodes([("mm", 2e-6), ("add", 1e-6), ("mm", 3e-6)], 9e-6)
    assert found["nodes"] == 3
    assert found["us_per_node"] == pytest.approx(3.0)
    assert found["busy_ms"] == pytest.approx(6e-3)
    assert found["top"] == [["mm", 2, 0.005], ["add", 1, 0.001]]
    assert launches.nodes([], 1e-6)["us_per_node"] == pytest.approx(1.0)


def test_record(tmp_path, capsys):
    options = ["--results", str(tmp_path), "--workload", "anil-head", "--tasks", "2"]
    launches.main(options)
    (path,) = tmp_path.rglob("launches.json")
    (run,) = load(path)
    assert run["complete"]
    assert [row["workload"] for row in run["rows"]] == ["anil-head"]
    launches.main([*options, "--minutes", "0", "--name", "none"])
    assert "out of time before anil-head" in capsys.readouterr().out


@pytest.mark.gpu
def test_row_on_a_gpu():
    row = launches.read(small(device="cuda"))
    assert row["why"] is None
    assert row["graph"]["nodes"] > 5
    assert row["launched"]["replaying"]["operations"] > 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_cuda_where_there_is_none(capsys):
    with pytest.raises(SystemExit):
        launches.main(["--device", "cuda"])
    assert "expected a machine with CUDA" in capsys.readouterr().err
