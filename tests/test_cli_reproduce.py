"""`fastkfo reproduce`, made short: its files, the same twice, the effect for one seed, errors."""

import csv
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastkfo.cli import reproduce_jobs
from fastkfo.cli.app import app
from fastkfo.cli.reproduce import FILES
from fastkfo.cli.reproduce_problems import PROBLEMS, learner_of, quick, sampler
from fastkfo.cli.reproduce_rows import rows, spread
from fastkfo.cli.reproduce_surface import adapted, meta_loss, surface
from fastkfo.cli.reproduce_training import Examined, Measured, Scores, examine
from tests.cases import needs_native

BY_NAME = {problem.name: problem for problem in PROBLEMS}


def invoke(out, **options):
    words = [f"--{k}={v}" for k, v in ({"seeds": 2, "processes": 1} | options).items()]
    return CliRunner().invoke(app, ["reproduce", "--quick", "--out", str(out), *words])


def load(out):
    def reject(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads((out / "results.json").read_text(), parse_constant=reject)


def test_files(tmp_path):
    out = tmp_path / "a" / "b"
    result = invoke(out)
    assert result.exit_code == 0, result.output
    assert "no number means anything" in result.output
    assert "…" not in result.output, "a cell was cut"
    assert sorted(p.name for p in out.iterdir()) == sorted(FILES)
    for path in out.glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert 10_000 < path.stat().st_size < 150_000

    record = load(out)
    groups = sum(len(p.methods) * len(p.exams) for p in PROBLEMS)
    assert len(record["rows"]) == groups == 23
    assert len(record["runs"]) == 2 * groups
    for run in record["runs"]:
        problem = quick(BY_NAME[run["problem"]])
        assert len(run["curve"]) == 2 * problem.steps + 1
        assert [rate[0] for rate in run["rates"]] == pytest.approx(problem.rates, rel=1e-5)
        test = {rate[0]: rate[3] for rate in run["rates"]}[run["chosen"]]
        assert test == run["curve"][problem.steps]
    text = (out / "report.md").read_text()
    for name in FILES[4:]:
        assert f"]({name})" in text
    assert (out / "table.md").read_text() in text
    with (out / "table.csv").open() as file:
        found = list(csv.DictReader(file))
    for row, other in zip(found, record["rows"], strict=True):
        assert row["method"] == other["method"]
        assert float(row["after"]) == pytest.approx(other["after"][0], rel=1e-5)
        assert (row["difference"] == "") == (other["difference"] is None)
        assert int(row["seeds"]) == 2


@pytest.mark.slow
def test_the_same_twice_and_in_two_processes(tmp_path):
    state = torch.get_rng_state()
    found = []
    for name, processes in (("a", 1), ("b", 2)):
        assert invoke(tmp_path / name, processes=processes).exit_code == 0
        found.append(load(tmp_path / name))
        del found[-1]["about"]
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("table.csv", "table.md"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()


# -------------------------------------------------------------------------------------- the effect


def scores(name, **options):
    """Test score of each method at the rate that validation chose; seed 0."""
    problem = replace(BY_NAME[name], iterations=300, test_tasks=200, **options)
    return {kind: examine(problem, kind, 0)[0].test.score for kind, _ in problem.methods}


@pytest.mark.slow
def test_depth_and_kfo_help_where_scales_are_unequal():
    mse = scores("regression", rates=(0.05, 0.1, 0.2))
    assert mse["linnet"] < 0.6 * mse["shallow"]
    assert mse["kfo"] < 0.2 * mse["shallow"]
    accuracy = scores("classification", rates=(0.5, 1.0, 2.0))
    assert accuracy["linnet"] > accuracy["shallow"] + 0.03
    assert accuracy["kfo"] > accuracy["shallow"] + 0.05


@pytest.mark.slow
def test_a_tuned_rate_is_enough_in_one_dimension():
    small = scores("line", rates=(0.025,))
    assert small["linnet"] < 0.3 * small["shallow"]
    assert small["kfo"] < 0.3 * small["shallow"]
    tuned = scores("line", rates=(0.4,))
    assert tuned["shallow"] == pytest.approx(tuned["kfo"], rel=0.05)


def test_the_learned_factors_take_the_step_that_the_rate_does_not():
    """One of a and b is 1 / √(2 α), the other 0: one step then reaches every task."""
    found = surface(BY_NAME["line"], 1)
    a, b = sorted(abs(x) for x in found.ends[0])
    # A little less than for infinitely many points, whose step would be too long for ten.
    assert b == pytest.approx((2 * found.rate) ** -0.5, rel=0.15)
    assert a < 0.1
    for w, steps in zip(found.tasks, found.adaptations, strict=True):
        products = [x * y for x, y in steps]
        assert abs(products[0] - w) > 0.8 * abs(w)
        assert abs(products[1] - w) < 0.4 * abs(w)


# ------------------------------------------------------------------------------------------ pieces


def test_all_methods_have_the_same_tasks_and_weights():
    problem = BY_NAME["digits"]
    first, again = (sampler(problem, "test", 3, "seen")(2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first.x_s.shape == (2, 25, 64)
    other = sampler(problem, "validation", 3, "seen")(2)
    assert not torch.equal(first.x_s, other.x_s)
    weights = [list(learner_of(problem, kind, 0.1, 5).parameters()) for kind, _ in problem.methods]
    assert torch.equal(weights[0][0], weights[2][0])
    assert torch.equal(weights[1][0], weights[3][0])


@pytest.mark.parametrize("name", ["regression", "classification"])
def test_scales(name):
    control, problem = BY_NAME[f"{name}-equal"], BY_NAME[name]
    plain, scaled = (sampler(p, "train", 0)(4) for p in (control, problem))
    assert torch.equal(plain.y_s, scaled.y_s)
    ratio = (scaled.x_s / plain.x_s)[0, 0]
    assert ratio.square().mean() == pytest.approx(1, rel=1e-5)
    assert ratio[0] / ratio[-1] == pytest.approx(10, rel=1e-5)


def test_meta_loss_is_that_of_a_step():
    torch.manual_seed(0)
    point = torch.randn(2, dtype=torch.float64, requires_grad=True)
    w = torch.tensor(0.7, dtype=torch.float64)
    loss = (point.prod() - w) ** 2
    (grad,) = torch.autograd.grad(loss, point)
    torch.testing.assert_close(adapted(point, w, 0.3), point - 0.3 * grad)
    # Without a step, E (a b − w)² = (a b)² + E w², whose quantiles are a little short of 1.
    found = meta_loss(point.detach(), 0.0)
    assert found == pytest.approx((point.prod() ** 2).item() + 1, rel=0.02)


def test_spread_is_students():
    mean, half = spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    assert mean == 5.5
    assert half == pytest.approx(2.262 * 3.02765 / 10**0.5, rel=1e-4)
    assert spread([0.0, 1.0])[1] == pytest.approx(12.706 / 2, rel=1e-4)
    assert spread([1.0])[1] != spread([1.0])[1]
    assert spread(range(40))[1] == pytest.approx(1.96 * 11.6905 / 40**0.5, rel=1e-4)


def test_differences_are_taken_seed_by_seed():
    problem = replace(BY_NAME["regression"], rates=(0.1,))
    done = []
    for method, values in (("Shallow", (1.0, 2.0, 4.0)), ("Deep", (0.5, 1.5, 3.5))):
        for seed, value in enumerate(values):
            score = Scores(value, None)
            measured = Measured(0.1, 1, score, score)
            curve = (score,) * 11
            found = Examined("regression", "new-tasks", method, seed, (measured,), 0.1, curve)
            done.append(reproduce_jobs.Done([found], 1.0))
    shallow, deep = rows([problem], done)
    assert shallow.difference is None
    assert deep.difference == (pytest.approx(-0.5), pytest.approx(0.0, abs=1e-9))
    assert deep.after[1] > 1
    assert deep.skipped == 3


def test_a_loss_that_is_not_finite_is_never_chosen(monkeypatch):
    problem = replace(quick(BY_NAME["regression"]), rates=(1e30, 0.1))
    for kind in ("shallow", "linnet"):
        (found,) = examine(problem, kind, 0)
        assert found.chosen == 0.1
        assert found.rates[0].test.loss == float("inf")
        assert found.rates[0].skipped > 0


# ------------------------------------------------------------------------- interrupts and options


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupts_write_nothing(number, code, tmp_path, monkeypatch):
    original, calls = reproduce_jobs.examine, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return original(*args)

    monkeypatch.setattr(reproduce_jobs, "examine", interrupted)
    result = invoke(tmp_path)
    assert result.exit_code == code
    assert f"{number.name}: nothing was written" in result.output
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []


def test_bad_options(tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("training started")

    monkeypatch.setattr(reproduce_jobs, "examine", refuse)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "table.csv").mkdir(parents=True)
    for name in ("file", "file/out", "folder"):
        result = invoke(tmp_path / name)
        assert result.exit_code == 2
        assert "expected a folder that can be" in " ".join(result.output.replace("│", " ").split())
    for option in ({"seeds": 0}, {"processes": -1}, {"seeds": "x"}):
        result = invoke(tmp_path / "out", **option)
        assert result.exit_code == 2
        assert f"--{next(iter(option))}" in result.output
        assert not (tmp_path / "out").exists()


def test_help():
    result = CliRunner().invoke(app, ["reproduce", "--help"])
    assert result.exit_code == 0
    assert "Meta-KFO" in result.output
    assert "Raises" not in result.output


@needs_native
def test_docs_quote_the_record_and_their_example_runs():
    root = Path(__file__).resolve().parent.parent
    text = (root / "docs" / "reproduce.md").read_text()
    (table,) = root.glob("bench/results/*/reproduce/table.md")
    assert table.read_text() in text
    for image in re.findall(r"\]\((images/.*?)\)", text):
        assert (root / "docs" / image).stat().st_size < 150_000
    found = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], found)
    assert found["inner_loop"].why_not_fused() is None
    x = found["x"][1, 0]
    torch.testing.assert_close(found["model"](x), found["learner"](x), rtol=1e-4, atol=1e-5)
