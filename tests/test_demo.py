"""The demo, made short: its table and files, interrupts, divergence, bad options."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from fastkfo.cli import demo_methods, demo_training, main
from fastkfo.cli.app import app
from fastkfo.cli.demo_methods import METHODS, Run, Settings, build_runs
from fastkfo.cli.demo_report import interval

SHORT = {
    "--minutes": "0.01",
    "--ways": "3",
    "--shots": "2",
    "--queries": "3",
    "--steps": "2",
    "--meta-batch": "2",
    "--test-tasks": "4",
    "--valid-tasks": "3",
    "--rounds": "2",
}


def run_demo(out, **options):
    arguments = SHORT | {f"--{k.replace('_', '-')}": str(v) for k, v in options.items()}
    words = [word for pair in (arguments | {"--out": str(out)}).items() for word in pair]
    return CliRunner().invoke(app, ["demo", *words], env={"COLUMNS": "80"})


def load(out):
    def reject(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads((out / "demo.json").read_text(), parse_constant=reject)


def rows(output):
    """The table's cells, by method."""
    cells = {}
    for name in METHODS:
        pattern = rf"^{re.escape(name)}‡? +(\d+ .*)$"
        lines = [line for line in output.splitlines() if re.match(pattern, line)]
        assert len(lines) == 1, output
        cells[name] = re.match(pattern, lines[0])[1].replace(" ± ", "±").split()
    return cells


def assert_is_png(path):
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 10_000


def test_table_json_and_png(tmp_path):
    out = tmp_path / "a" / "b"
    result = run_demo(out)
    assert result.exit_code == 0, result.output
    for cells in rows(result.output).values():
        iterations, before, after, plain, ours, ratio, difference = cells
        before, after = (text.partition("±")[0] for text in (before, after))
        assert int(iterations) >= 1
        assert 0 <= float(before) <= 100
        assert 0 <= float(after) <= 100
        assert float(plain) > 0
        assert float(ours) > 0
        assert ratio.endswith("x")
        assert float(difference) < 1e-3
    assert "…" not in result.output, "a cell was cut"
    assert "never seen in training" in result.output
    assert "upright" in result.output
    assert "float32" in result.output
    assert len(result.output.splitlines()) < 60
    assert_is_png(out / "demo.png")

    record = load(out)
    assert record["settings"]["ways"] == 3
    assert record["interrupted_by"] is None
    assert {"fastkfo", "python", "torch", "numpy", "scikit-learn"} <= set(record["versions"])
    assert list(record["methods"]) == list(METHODS)
    iterations = {method["iterations"] for method in record["methods"].values()}
    assert len(iterations) == 1, "the methods were trained for unequal numbers of iterations"
    for method in record["methods"].values():
        assert method["failure"] is None
        assert len(method["losses"]) == method["iterations"]
        assert method["validation"][0]["iteration"] == 0
        assert method["validation"][-1]["iteration"] == method["iterations"]
        accuracies = torch.tensor(method["test"]["accuracies_by_task_and_step"])
        assert accuracies.shape == (4, 2 * 2 + 1)
        mean = method["test"]["accuracy_after"]["mean"]
        assert mean == pytest.approx(accuracies[:, 2].mean().item(), abs=1e-3)
        assert len(method["timing"]["reference"]) == len(method["timing"]["fastkfo"]) == 2
        assert method["meta_gradient_difference"]["dtype"] == "float32"
        assert method["meta_gradient_difference"]["largest"] < 1e-3
    assert record["methods"]["MAML"]["parameters"] == record["methods"]["MAML-KFO"]["parameters"]


def test_iterations_end_the_training(tmp_path):
    result = run_demo(tmp_path, minutes=60, iterations=2)
    assert result.exit_code == 0, result.output
    assert {method["iterations"] for method in load(tmp_path)["methods"].values()} == {2}


def send_at(monkeypatch, name, call, number, when=lambda *args: True):
    """Sends this process a signal as a method of Run is called the given time."""
    original, calls = getattr(Run, name), []

    def wrapper(self, *args):
        if when(*args):
            calls.append(None)
            if len(calls) == call:
                os.kill(os.getpid(), number)
        return original(self, *args)

    monkeypatch.setattr(Run, name, wrapper)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
@pytest.mark.parametrize("phase", ["first validation", "training", "testing", "timing"])
def test_interrupts_keep_what_there_is(phase, number, code, tmp_path, monkeypatch):
    options = {"minutes": 0.01}
    if phase == "first validation":
        send_at(monkeypatch, "accuracies", 2, number)
    elif phase == "training":
        options["minutes"] = 60
        send_at(monkeypatch, "meta_gradient", 8, number)
    elif phase == "testing":
        send_at(monkeypatch, "accuracies", 5, number, lambda *args: args[-1] == 4)
    else:
        send_at(monkeypatch, "reference_gradient", 4, number)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    result = run_demo(tmp_path, **options)
    assert result.exit_code == code, result.output
    assert number.name in result.output
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    cells = rows(result.output)
    assert_is_png(tmp_path / "demo.png")
    record = load(tmp_path)
    assert record["interrupted_by"] == number.name
    for name, method in record["methods"].items():
        if phase == "first validation":
            assert cells[name] == ["0", *"------"]
            assert method["iterations"] == 0
            assert method["validation"] == []
            assert method["test"] is None
        elif phase == "training":
            assert method["iterations"] == 3
            assert [point["iteration"] for point in method["validation"]] == [0]
            assert method["test"] is None
            assert cells[name][2].endswith("†")
        elif phase == "testing":
            assert method["test"]["tasks"] == 2
            assert method["timing"] is None
        else:
            assert method["test"]["tasks"] == 4
            assert (method["timing"] is None) == (name != "MAML")  # its round was finished
    if phase == "testing":
        assert "2 of 4 tasks" in result.output


def test_second_interrupt_quits_at_once():
    code = (
        "import os, signal\n"
        "from fastkfo.cli.interrupts import Interrupts\n"
        "with Interrupts() as interrupts:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print(interrupts.signal.name, interrupts.exit_code, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 130, result.stderr
    assert result.stdout.split() == ["SIGINT", "130"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_divergence_is_reported(where, tmp_path, monkeypatch):
    original = Run.meta_gradient

    def meta_gradient(self, tasks):
        loss = original(self, tasks)
        if self.name == "MAML-KFO" and len(self.losses) == 2:
            if where == "loss":
                return float("nan")
            next(self.learner.parameters()).grad[0] = float("inf")
        return loss

    monkeypatch.setattr(Run, "meta_gradient", meta_gradient)
    result = run_demo(tmp_path, minutes=0.05)
    assert result.exit_code == 0, result.output
    expected = {"loss": "query loss was nan", "gradient": "meta-gradient was not finite"}[where]
    assert "MAML-KFO‡" in result.output
    assert f"MAML-KFO stopped training at iteration 3: the {expected}" in result.output.replace(
        "\n", " "
    )
    methods = load(tmp_path)["methods"]
    assert methods["MAML-KFO"]["iterations"] == 2
    assert methods["MAML-KFO"]["failure"] == f"iteration 3: the {expected}"
    assert methods["MAML"]["iterations"] > 3
    assert methods["MAML"]["failure"] is None


def test_predictions_that_are_not_finite_are_reported(tmp_path):
    result = run_demo(tmp_path, inner_lr=1e30)
    assert result.exit_code == 0, result.output
    text = result.output.replace("\n", " ")
    for name in METHODS:
        assert f"{name} stopped training at iteration" in text
        assert f"{name}: predictions not finite in 4 test tasks" in text
    load(tmp_path)  # strict JSON in spite of all the NaN


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0}, "expected a positive finite number, got 0.0"),
        ({"minutes": "nan"}, "expected a positive finite number, got nan"),
        ({"inner_lr": "inf"}, "expected a positive finite number, got inf"),
        ({"meta_lr": -1}, "expected a positive finite number, got -1.0"),
        ({"ways": 6}, "ways: expected at most 5"),
        ({"ways": 1}, "--ways"),
        ({"queries": 1000}, "shots + queries: expected at most"),
        ({"steps": 0}, "--steps"),
        ({"iterations": 0}, "--iterations"),
        ({"seed": -1}, "--seed"),
        ({"seed": "x"}, "--seed"),
    ],
    ids=lambda value: "-".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_bad_options(options, message, tmp_path, monkeypatch):
    forbid_training(monkeypatch)
    result = run_demo(tmp_path / "out", **options)
    assert result.exit_code == 2
    assert message in flat(result.output)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["file", "below a file", "read-only", "png is a folder"])
def test_folder_not_writable_is_said_before_training(kind, tmp_path, monkeypatch):
    forbid_training(monkeypatch)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "demo.png").mkdir(parents=True)
    if kind == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        (tmp_path / "closed").mkdir(mode=0o500)
    paths = {
        "file": "file",
        "below a file": "file/out",
        "read-only": "closed",
        "png is a folder": "folder",
    }
    result = run_demo(tmp_path / paths[kind])
    assert result.exit_code == 2
    assert "--out" in result.output
    assert "expected a folder that can be written to" in flat(result.output)


def test_methods_start_equal():
    first, extra, kfo = build_runs(Settings(seed=3))
    for a, b in zip(first.model.parameters(), kfo.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first.model[:5].parameters(), extra.model[:5].parameters(), strict=True):
        assert torch.equal(a, b)
    other = build_runs(Settings(seed=4))[0].model[0].weight
    assert not torch.equal(first.model[0].weight, other)


def test_difference_is_relative_and_keeps_nan():
    settings = Settings(ways=2, shots=1, queries=1, steps=1, valid_tasks=2, test_tasks=2)
    tasks = demo_training.TaskSets(settings).train.sample(2)
    for run in build_runs(settings):
        reference = run.reference_gradient(tasks)
        run.meta_gradient(tasks)
        assert run.difference(reference) < 1e-4
        last = list(run.learner.parameters())[-1]
        last.grad *= 1.5
        assert run.difference(reference) == pytest.approx(0.5, rel=1e-3)
        last.grad.fill_(float("nan"))
        assert run.difference(reference) != run.difference(reference)


def test_interval():
    mean, half = interval(torch.tensor([0.0, 1.0, 0.5, 0.5]))
    assert mean == 0.5
    assert half == pytest.approx(1.96 * (0.5 / 3) ** 0.5 / 2)
    assert interval(torch.tensor([0.5]))[1] != interval(torch.tensor([0.5]))[1]


def test_message_without_the_extra(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "fastkfo.cli.app")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 1
    assert "pip install --no-build-isolation '.[demo]'" in capsys.readouterr().err


def test_version_and_help():
    assert CliRunner().invoke(app, ["--version"]).output.startswith("fastkfo ")
    result = CliRunner().invoke(app, ["demo", "--help"])
    assert result.exit_code == 0
    assert "Ctrl-C" in result.output
    assert "Raises" not in result.output


def forbid_training(monkeypatch):
    def refuse(*args):
        raise AssertionError("training started")

    monkeypatch.setattr(demo_methods.Run, "accuracies", refuse)
    monkeypatch.setattr(demo_methods.Run, "meta_gradient", refuse)


def flat(output):
    """Undoes the box and the line breaks of an error message."""
    return " ".join(output.replace("│", " ").split())
