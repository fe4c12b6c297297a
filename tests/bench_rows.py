"""Made-up readings, and the benchmark's command run on them."""

import pytest
import typer
from typer.testing import CliRunner

from bench import __main__ as command
from bench import machine
from bench.problem import Problem
from bench.records import load

RATES = {
    "gemm": {d: {"gflops": 100.0, "best": "mm"} for d in ("float32", "float64")},
    "copy": {"gb_per_s": 10.0},
}


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    """`fastkfo bench` with made-up ceilings, into a folder of its own."""
    monkeypatch.setattr(command.ceilings, "measure", lambda device: RATES)
    app = typer.Typer()
    app.command()(command.bench)
    return lambda *options: CliRunner().invoke(app, ["--results", str(tmp_path), *options])


def only_record(folder):
    (path,) = folder.rglob("*.json")
    return load(path)


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
