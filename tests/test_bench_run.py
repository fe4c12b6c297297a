"""The benchmark's measuring, records, command and report; no reading itself is tested."""

import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fastkfo.cli.bench
from bench import __main__ as command
from bench import (
    clock,
    dispatches,
    machine,
    measure,
    memory,
    report,
    row,
    scaling,
    summary,
    table,
)
from bench.peers import peer, vmap_peer
from bench.problem import Problem
from bench.records import Record, load
from bench.workloads import WORKLOADS
from fastkfo.cli.app import app as fastkfo_app

ROOT = Path(__file__).resolve().parent.parent
RATES = {"gemm": {d: {"gflops": 100.0, "best": "mm"} for d in ("float32", "float64")},
         "copy": {"gb_per_s": 10.0}}  # fmt: skip


# -- measuring


def test_rounds_are_interleaved():
    order = []
    runs = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    samples = measure.interleaved(runs, rounds=3)
    assert [sorted(order[k : k + 3]) for k in (0, 3, 6)] == [["a", "b", "c"]] * 3
    assert order[0] != order[3]  # nobody is always first
    assert {s for taken in samples.values() for s in taken} == {float(k) for k in range(1, 10)}


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
    row = command.read(problem, ["learn2learn"], 0.0, RATES)
    assert row["busy_elsewhere"] == 0.5
    assert row["peers"]["learn2learn"]["speedup"]["unstable"]
    assert any("0.5 cores were busy" in line for line in table.remarks([row]))


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


# -- records


def test_record_is_whole_after_every_row(tmp_path):
    record = Record(tmp_path / "machine" / "name.json")
    record.begin(environment={})
    record.add({"workload": "one"})
    (run,) = load(record.path)
    assert run == {"environment": {}, "complete": False, "rows": [{"workload": "one"}]}
    record.end()
    assert load(record.path)[0]["complete"]
    assert [path.name for path in record.path.parent.iterdir()] == ["name.json"]


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="results: expected a folder that can be written, got"):
        Record(tmp_path / "file" / "name.json")


def test_foreign_json_is_no_record(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match="expected a record of format 1"):
        load(path)


def test_machine_name_is_a_folder():
    assert machine.name("cpu").replace("-", "").isalnum()
    kept = machine.environment("cpu")
    assert {"cpu", "cores", "threads", "versions", "commit", "date", "python"} <= kept.keys()
    assert kept["versions"]["torch"] == torch.__version__


# -- the command


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    """`fastkfo bench` with made-up readings, into a folder of its own."""
    import typer

    monkeypatch.setattr(command.ceilings, "measure", lambda device: RATES)
    app = typer.Typer()
    app.command()(command.bench)
    return lambda *options: CliRunner().invoke(app, ["--results", str(tmp_path), *options])


def only_record(folder):
    (path,) = folder.rglob("*.json")
    return load(path)


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [
        ("--workload", "mnist", list(WORKLOADS)),
        ("--peer", "tensorflow", ["learn2learn", "vmap", "higher"]),
        ("--method", "reptile", ["maml", "kfo-adapt"]),
        ("--sweep", "depth", list(scaling.AXES)),
        ("--dtype", "int8", ["float32", "float64"]),
        ("--device", "tpu", ["cpu", "cuda"]),
    ],
)
def test_unknown_names_list_the_known(invoke, tmp_path, option, value, known):
    result = invoke(option, value)
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert all(name in said.replace("│ ", "") for name in [*known, value])
    assert not list(tmp_path.rglob("*.json"))


def test_unwritable_results_are_said_before_anything_is_measured(invoke, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "read", lambda *a: pytest.fail("measured"))
    (tmp_path / machine.name("cpu")).write_text("in the way")
    result = invoke()
    assert result.exit_code == 2
    assert "can be written" in " ".join(result.output.split())


def test_interrupted_run_leaves_its_finished_rows(invoke, tmp_path, monkeypatch):
    def read(problem, *rest):
        if problem.method == "kfo":
            raise KeyboardInterrupt
        return made_up(problem)

    monkeypatch.setattr(command, "read", read)
    result = invoke("--workload", "anil-head", "--method", "maml", "--method", "kfo")
    assert result.exit_code == 130
    assert "interrupted: 1 finished row(s) are in" in result.output
    assert "anil-head maml" in result.output  # and are shown
    (run,) = only_record(tmp_path)
    assert [row["method"] for row in run["rows"]] == ["maml"]
    assert not run["complete"]


def test_interrupted_before_the_first_row(invoke, tmp_path, monkeypatch):
    def read(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "read", read)
    result = invoke("--workload", "anil-head")
    assert result.exit_code == 130
    assert "nothing was written to" in result.output
    assert not list(tmp_path.rglob("*.json"))


def test_selections_exclude_each_other(invoke):
    for options in (["--all", "--readme"], ["--all", "--workload", "anil-head"]):
        result = invoke(*options)
        assert result.exit_code == 2
        assert "expected one of them" in " ".join(result.output.split())


def test_learn2learn_is_always_there_and_nobody_twice(invoke, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "read", lambda p, names, *_: asked.append(names) or made_up(p))
    result = invoke("--workload", "anil-head", "--workload", "anil-head", "--method", "kfo",
                    "--peer", "vmap", "--peer", "vmap")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert asked == [["learn2learn", "vmap"]]


def test_runs_and_sizes(invoke, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "read", lambda p, *rest: asked.append(p) or made_up(p))
    result = invoke("--workload", "sine-mlp", "--method", "kfo", "--tasks", "3", "--steps", "2",
                    "--width", "8", "--dtype", "float64", "--runs", "2")  # fmt: skip
    assert result.exit_code == 0, result.output
    wanted = Problem("sine-mlp", "kfo", tasks=3, steps=2, width=8, dtype=torch.float64)
    assert asked == [wanted, wanted]
    assert [run["complete"] for run in only_record(tmp_path)] == [True, True]


def test_out_of_time_is_said_and_the_record_is_not_complete(invoke, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "read", lambda p, *rest: made_up(p))
    later = iter([0.0, 1.0, 1e6, 1e6, 1e6])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(later))
    result = invoke("--workload", "anil-head", "--method", "maml", "--method", "kfo")
    assert "out of time before anil-head kfo" in " ".join(result.output.split())
    (run,) = only_record(tmp_path)
    assert len(run["rows"]) == 1
    assert not run["complete"]


def test_a_whole_small_run(invoke, tmp_path):
    result = invoke("--workload", "anil-head", "--method", "maml", "--tasks", "2", "--steps", "1",
                    "--peer", "learn2learn", "--peer", "vmap", "--minutes", "0.1")  # fmt: skip
    assert result.exit_code == 0, result.output
    (run,) = only_record(tmp_path)
    (row,) = run["rows"]
    assert row["floors"]["least_ms"] > 0
    for entry in row["peers"].values():
        assert entry["status"] == "ok"
        assert len(entry["samples_s"]) >= 3
        assert entry["launches"] > 0
        assert entry["times_floor"] > 0
        assert entry["gate"]["worst"] < 1e-9
        assert entry["difference"] < 1e-4


def test_command_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(fastkfo, "__file__", str(tmp_path / "fastkfo" / "__init__.py"))
    result = CliRunner().invoke(fastkfo_app, ["bench", "--all"])
    assert result.exit_code == 1
    assert "Clone the repository" in result.output


def test_command_hands_over_its_options(monkeypatch):
    called = []

    monkeypatch.setattr(fastkfo.cli.bench.os, "execve", lambda *words: called.append(words))
    CliRunner().invoke(fastkfo_app, ["bench", "--peer", "vmap", "--help"])
    ((program, words, environment),) = called
    assert program == sys.executable
    assert words == [sys.executable, "-m", "bench", "--peer", "vmap", "--help"]
    assert environment["PYTHONPATH"].startswith(str(ROOT))


# -- several runs, and the report


def made_up(problem, learn2learn=10.0, fastkfo=5.0):
    def entry(ms, ratio):
        return {
            "status": "ok", "why": None, "gate": {"worst": 1e-15, "whole": 1e-16},
            "difference": 1e-7, "compile_s": None, "samples_s": [ms / 1e3] * 3, "median_ms": ms,
            "q1_ms": ms, "q3_ms": ms, "times_floor": ms, "peak_bytes": 1 << 20,
            "launches": 7, "replay_ms": None,
            "speedup": {"median": ratio, "q1": ratio, "q3": ratio, "unstable": False},
        }  # fmt: skip

    wrong = entry(2.0, 5.0) | {"status": "wrong", "why": "wrong by 1e-03, w by 4e+00",
                               "gate": {"worst": 4.0, "whole": 1e-3}}  # fmt: skip
    del wrong["speedup"]
    return {
        "workload": problem.workload, "method": problem.method, "tasks": problem.tasks,
        "steps": problem.steps, "width": problem.width, "dtype": "float32", "device": "cpu",
        "floors": {"least_ms": 1.0}, "took_s": 1.0, "rounds": 7, "busy_elsewhere": 0.0,
        "peers": {
            "learn2learn": entry(learn2learn, 1.0),
            "fastkfo": entry(fastkfo, learn2learn / fastkfo),
            "vmap": wrong,
            "jax": {"status": "missing", "why": "jax is not installed"},
        },
    }  # fmt: skip


def made_up_runs():
    problem = Problem.named("anil-head", "kfo")
    about = {"environment": machine.environment("cpu"), "ceilings": RATES, "complete": True}
    return [{**about, "rows": [made_up(problem, fastkfo=ms)]} for ms in (5.0, 4.0, 2.5)]


def test_spread_over_runs():
    (row,) = summary.merged(made_up_runs())
    ours = row["peers"]["fastkfo"]
    assert ours["runs"] == 3
    assert (ours["lowest"], ours["speedup"], ours["highest"]) == (2.0, 2.5, 4.0)
    assert "speedup" not in row["peers"]["vmap"]
    assert row["peers"]["jax"] == {"status": "missing", "why": "jax is not installed"}


def test_one_wrong_run_is_wrong():
    runs = made_up_runs()
    bad = runs[1]["rows"][0]["peers"]
    bad["fastkfo"] = dict(bad["vmap"])
    (row,) = summary.merged(runs)
    assert row["peers"]["fastkfo"]["status"] == "wrong"
    assert "speedup" not in row["peers"]["fastkfo"]


def test_table_says_who_is_wrong_and_who_is_missing():
    quoted = report.quoted(made_up_runs())
    assert "4.00 ms, **2.50x (2.00-4.00)**" in quoted
    assert "wrong by 1e-03 (2.00 ms)" in quoted
    assert "| missing |" in quoted
    page = report.page("machine", {"name": made_up_runs()})
    assert "missing: jax is not installed" in page
    assert "wrong by 1e-03, w by 4e+00" in page


def test_one_run_has_no_spread():
    quoted = report.quoted(made_up_runs()[:1])
    assert "**2.00x (one run)**" in quoted
    runs = made_up_runs()
    runs[0]["complete"] = False
    assert "## name (cut short)" in report.page("machine", {"name": runs})


def test_other_sizes_are_named():
    problem = Problem.named("anil-head", "kfo", width=32)
    runs = made_up_runs()
    runs[0]["rows"].append(made_up(problem) | {"dtype": "float64"})
    assert "`anil-head` T 16, K 5, width 32, float64" in report.quoted(runs)


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (312.4, "312"), (41.23, "41.2"), (2.104, "2.10"),
                        (0.0123, "0.012"), (1e-9, "<0.0001"), (0, "0.00"), (12345.6, "12,346")]
)  # fmt: skip
def test_numbers_have_no_exponent(value, text):
    assert table.number(value) == text


def test_narrow_terminals_have_fewer_columns():
    rows = made_up_runs()[0]["rows"]
    assert len(table.problems(rows, 200).columns) == len(table.COLUMNS)
    assert len(table.problems(rows, 80).columns) == 4


def test_readme_is_what_the_records_say():
    """One command makes the README's table; nobody edits it."""
    text = (ROOT / "README.md").read_text()
    inside = text.split(report.BEGIN)[1].split(report.END)[0].strip()
    quoting = list((ROOT / "bench/results").glob(f"*/{report.README}.json"))
    assert inside in [report.quoted(load(path)).strip() for path in quoting]


# -- scaling


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
    monkeypatch.setattr(scaling, "_too_much", lambda points, x, power, device: (
        "would not fit" if x == 4 else None))  # fmt: skip
    row = swept("tasks", ["learn2learn", "torchopt", "vmap"], steps=1)[-1]
    vmap = row["peers"]["vmap"]
    assert [point["x"] for point in vmap["points"]] == [1, 2, 3]
    assert all(point["gated"] for point in vmap["points"])
    assert vmap["stopped"] == "would not fit"
    assert vmap["slope"] is not None
    assert "would not fit" in scaling.cells(vmap)[2]
    assert scaling.table([row]).row_count == 4


def test_sweep_is_on_disk_after_every_point(invoke, tmp_path, short, monkeypatch):
    kept = []
    monkeypatch.setattr(Record, "replace", lambda self, row: kept.append(row) or self._write())
    result = invoke("--sweep", "steps", "--workload", "anil-head", "--method", "maml", "--peer",
                    "vmap", "--width", "8")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert kept
    ((row,),) = [run["rows"] for run in only_record(tmp_path)]
    assert [point["x"] for point in row["peers"]["vmap"]["points"]] == [1, 2]


def test_sweep_out_of_time(short):
    row = swept("tasks", ["learn2learn"], until=0.0, steps=1)[-1]
    assert row["peers"]["learn2learn"]["stopped"] == "out of time before 1"


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

    assert scaling._too_much([], 4, 1, "cpu") is None
    assert scaling._too_much(point(1.0, 1 << 20), 4, 1, "cpu") is None
    assert "a call would take about 40 s" in scaling._too_much(point(2e4, 0), 4, 1, "cpu")
    assert "GiB" in scaling._too_much(point(1.0, 1 << 50), 4, 1, "cpu")
    assert scaling._too_much(point(1.0, 1 << 50), 4, 1, "cuda") is None
