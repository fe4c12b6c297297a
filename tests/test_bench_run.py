"""The benchmark's measuring, records, command and report; no reading itself is tested."""

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fastkfo.cli.bench
from bench import __main__ as command
from bench import dispatches, machine, measure, memory, report, scaling, summary
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
    assert measure.rounds_for(0, 1) == 3
    assert measure.rounds_for(10, 0) == 40


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
    assert "interrupted: the finished rows are in" in result.output
    (run,) = only_record(tmp_path)
    assert [row["method"] for row in run["rows"]] == ["maml"]
    assert not run["complete"]


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

    class Done:
        returncode = 3

    monkeypatch.setattr(
        fastkfo.cli.bench.subprocess, "run", lambda words, **kw: called.append((words, kw)) or Done
    )
    result = CliRunner().invoke(fastkfo_app, ["bench", "--peer", "vmap", "--help"])
    assert result.exit_code == 3
    ((words, kw),) = called
    assert words == [sys.executable, "-m", "bench", "--peer", "vmap", "--help"]
    assert kw["env"]["PYTHONPATH"].startswith(str(ROOT))


# -- several runs, and the report


def made_up(problem, learn2learn=10.0, fastkfo=5.0):
    def entry(ms, ratio):
        return {
            "status": "ok", "why": None, "gate": {"worst": 1e-15, "whole": 1e-16},
            "difference": 1e-7, "compile_s": None, "samples_s": [ms / 1e3] * 3, "median_ms": ms,
            "q1_ms": ms, "q3_ms": ms, "times_floor": ms, "peak_bytes": 1 << 20, "launches": 7,
            "speedup": {"median": ratio, "q1": ratio, "q3": ratio, "unstable": False},
        }  # fmt: skip

    wrong = entry(2.0, 5.0) | {"status": "wrong", "why": "wrong by 1e-03, w by 4e+00",
                               "gate": {"worst": 4.0, "whole": 1e-3}}  # fmt: skip
    del wrong["speedup"]
    return {
        "workload": problem.workload, "method": problem.method, "tasks": problem.tasks,
        "steps": problem.steps, "width": problem.width, "dtype": "float32", "device": "cpu",
        "floors": {"least_ms": 1.0}, "took_s": 1.0,
        "peers": {
            "learn2learn": entry(learn2learn, 1.0),
            "fastkfo": entry(fastkfo, learn2learn / fastkfo),
            "vmap": wrong,
            "jax": {"status": "missing", "why": "jax is not installed"},
        },
    }  # fmt: skip


def made_up_runs():
    problem = Problem.named("anil-head", "kfo")
    about = {"environment": machine.environment("cpu"), "ceilings": RATES}
    return [{**about, "rows": [made_up(problem, fastkfo=ms)]} for ms in (5.0, 4.0, 2.5)]


def test_spread_over_runs():
    (row,) = summary.merged(made_up_runs())
    assert row["runs"] == 3
    ours = row["peers"]["fastkfo"]
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
    table = report.quoted(made_up_runs())
    assert "4.00 ms, **2.50x (2.00-4.00)**" in table
    assert "wrong by 1e-03 (2.00 ms)" in table
    assert "| missing |" in table
    page = report.page("machine", {"name": made_up_runs()})
    assert "missing: jax is not installed" in page
    assert "wrong by 1e-03, w by 4e+00" in page


def test_readme_is_what_the_records_say():
    """One command makes the README's table; nobody edits it."""
    text = (ROOT / "README.md").read_text()
    inside = text.split(report.BEGIN)[1].split(report.END)[0].strip()
    quoting = list((ROOT / "bench/results").glob(f"*/{report.QUOTED}.json"))
    assert inside in [report.quoted(load(path)).strip() for path in quoting]


# -- scaling


def test_slope():
    points = [(2.0**k, 5 + 3 * 2.0**k) for k in range(10)]
    assert scaling.slope(points) == pytest.approx(1, abs=0.05)
    assert scaling.slope([(k, k**2) for k in range(1, 6)]) == pytest.approx(2)
    assert scaling.slope([(1, 1), (2, 2)]) is None


def test_sweep(monkeypatch):
    monkeypatch.setitem(scaling.AXES, "tasks", ((1, 2, 3, 4), 1))
    monkeypatch.setattr(
        scaling,
        "_too_much",
        lambda points, x, power, device: (
            ("would not fit" if x == 4 and points[-1]["x"] == 3 else None) if points else None
        ),
    )
    problem = Problem.named("anil-head", "maml", steps=1)
    row = scaling.read(problem, "tasks", ["learn2learn", "torchopt", "vmap"], 0.0, RATES)
    vmap = row["peers"]["vmap"]
    assert [point["x"] for point in vmap["points"]] == [1, 2, 3]
    assert vmap["stopped"] == "would not fit"
    assert vmap["slope"] is not None
    assert "learn2learn" in str(scaling.table([row]).columns[0]._cells)


def test_sweep_ends_before_it_does_not_fit():
    def point(ms, size):
        return [{"x": 2, "median_ms": ms, "peak_bytes": size}]

    assert scaling._too_much([], 4, 1, "cpu") is None
    assert scaling._too_much(point(1.0, 1 << 20), 4, 1, "cpu") is None
    assert "a call would take about 40 s" in scaling._too_much(point(2e4, 0), 4, 1, "cpu")
    assert "GiB" in scaling._too_much(point(1.0, 1 << 50), 4, 1, "cpu")
    assert scaling._too_much(point(1.0, 1 << 50), 4, 1, "cuda") is None
