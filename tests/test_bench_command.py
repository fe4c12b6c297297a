"""The benchmark's records and its command, on made-up readings."""

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fastkfo.cli.bench
from bench import __main__ as command
from bench import machine, scaling
from bench.problem import Problem
from bench.records import Record, load
from bench.workloads import WORKLOADS
from fastkfo.cli.app import app as fastkfo_app
from tests.bench_rows import invoke, made_up, only_record

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called

__all__ = ["invoke"]

ROOT = Path(__file__).resolve().parent.parent


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
