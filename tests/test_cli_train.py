"""`fastkfo train` and `fastkfo evaluate`: options, resumption, signals, messages."""

import json
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastkfo.cli import main
from fastkfo.cli.app import app
from fastkfo.training import Trainer, load_checkpoint, read_config
from tests.training_cases import assert_same_run, words


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def flat(text):
    return " ".join(text.replace("│", " ").split())


def test_train_and_evaluate(tmp_path):
    result = invoke(*words(tmp_path / "r"))
    assert result.exit_code == 0, result.output
    assert "maml-kfo on digits, plain-2x4" in result.output
    assert result.output.count("validation accuracy") == 2
    assert f"Run folder: {tmp_path / 'r'}" in result.output
    test = json.loads((tmp_path / "r" / "result.json").read_text())["test"]
    assert f"{100 * test['after']:.2f} ±" in result.output

    evaluated = invoke("evaluate", tmp_path / "r", "--tasks", 4, "--json", tmp_path / "e.json")
    assert evaluated.exit_code == 0, evaluated.output
    found = json.loads((tmp_path / "e.json").read_text())
    assert (found["after"], found["before"]) == (test["after"], test["before"])
    assert "before adaptation" in evaluated.output
    assert f"{100 * test['after']:.2f} ±" in evaluated.output


def test_the_later_over_the_earlier(tmp_path):
    """Preset, then file, then command line."""
    (tmp_path / "c.yaml").write_text(
        "dataset: digits\nbackbone: mlp-4\niterations: 4\nvalidate-every: 0\ntest_tasks: 0\n"
    )
    result = invoke(
        "train", "--preset", "anil-cfs", "--config", tmp_path / "c.yaml", "--iterations", 1,
        "--meta-batch", 2, "--no-adapt-transform", "--out", tmp_path / "r",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    config = read_config(tmp_path / "r" / "config.toml")
    assert config["method"] == "anil-kfo"  # the preset's
    assert config["backbone"] == "mlp-4"  # the file's
    assert (config["iterations"], config["meta_batch"]) == (1, 2)
    assert config["adapt_transform"] is False
    again = invoke("train", "--config", tmp_path / "r" / "config.toml", "--out", tmp_path / "s")
    assert again.exit_code == 0, again.output
    assert_same_run_but_for_best(tmp_path / "r", tmp_path / "s")


def assert_same_run_but_for_best(one, other):
    a, b = load_checkpoint(one), load_checkpoint(other)
    assert all(torch.equal(a["learner"][k], b["learner"][k]) for k in a["learner"])


def signal_at(monkeypatch, iteration, number, times=1):
    """Sends this process a signal within an iteration."""
    step = Trainer._step

    def wrapper(self):
        if self.iteration + 1 == iteration:
            for _ in range(times):
                os.kill(os.getpid(), number)
        step(self)

    monkeypatch.setattr(Trainer, "_step", wrapper)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
@pytest.mark.parametrize("path", [False, True], ids=["resume", "resume path"])
def test_signals_and_resume(number, code, path, tmp_path, monkeypatch):
    assert invoke(*words(tmp_path / "whole")).exit_code == 0
    with monkeypatch.context() as patch:
        signal_at(patch, 4, number)
        handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        result = invoke(*words(tmp_path / "r"))
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert result.exit_code == code, result.output
    assert f"{number.name}: stopped after iteration 4" in result.output
    assert load_checkpoint(tmp_path / "r")["iteration"] == 4  # it was finished
    if path:
        resumed = invoke("train", "--resume", tmp_path / "r")
    else:
        resumed = invoke(*words(tmp_path / "r"), "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "iterations 4 to 6" in resumed.output
    assert_same_run(tmp_path / "r", tmp_path / "whole")


def test_a_signal_in_the_test_phase(tmp_path, monkeypatch):
    measured = Trainer._measured

    def wrapper(self, split, count):
        if split == "test":
            os.kill(os.getpid(), signal.SIGINT)
        return measured(self, split, count)

    monkeypatch.setattr(Trainer, "_measured", wrapper)
    result = invoke(*words(tmp_path / "r"))
    assert result.exit_code == 130, result.output
    assert "stopped after iteration 6" in result.output
    monkeypatch.setattr(Trainer, "_measured", measured)
    result = invoke("train", "--resume", tmp_path / "r" / "last.pt")
    assert result.exit_code == 0
    assert "test: accuracy" in result.output


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--ways", "6"], 2, "ways: expected at most 5"),
        (["--ways", "1"], 2, "ways: expected at least 2, got 1"),
        (["--ways", "x"], 2, "--ways"),
        (["--method", "x"], 2, "method: expected one of maml, anil, maml-kfo"),
        (["--dataset", "x"], 2, "dataset: expected one of digits, sinusoid"),
        (["--preset", "x"], 2, "preset: expected one of maml-cfs, anil-cfs, maml-mi, anil-mi"),
        (["--backbone", "x"], 2, "backbone: expected one like"),
        (["--dataset", "cifar-fs", "--root", "/nonexistent"], 1, "CIFAR-FS: not found"),
        (["--config", "none.toml"], 2, "config: expected a file that can be read"),
        (["--resume", "/nonexistent"], 1, "which is not there"),
        (["--resume"], 1, "which is not there"),
        (["--resume", "--overwrite"], 2, "expected no --resume beside it"),
        (["--seed", str(2**63 - 1)], 2, "seed: expected at most"),
        (["--seed", str(2**80)], 2, "seed: expected at most"),
        (["--meta-lr", "1e300"], 2, "meta_lr: expected at most"),
        (["--backbone", "mlp-9999999999"], 2, "backbone: expected one for inputs [1, 8, 8]"),
        (["--backbone", f"mlp-{10**22}"], 2, "backbone: expected one for inputs [1, 8, 8]"),
        (["--out", "/proc/none/r"], 2, "out: expected a folder that can be written to"),
        (["--queries", "1000"], 2, "shots + queries: expected at most"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors(options, code, message, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "run", None)
    result = invoke(*words(tmp_path / "r"), *options)
    assert result.exit_code == code, result.output
    assert message in flat(result.output)
    assert "Traceback" not in result.output
    assert len(result.output.splitlines()) < 12  # no frames of C++
    assert isinstance(result.exception, SystemExit)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"shots": 2**31 - 1, "queries": 2**31 - 1, "meta_batch": 2**31 - 1},
        {"shots": 2**31 - 1, "queries": 1, "meta_batch": 2**31 - 1},
        {"meta_batch": 2**31 - 1, "queries": 10**5},
    ],
    ids=["both", "shots", "batch"],
)
def test_tensors_beyond_the_memory(options, tmp_path):
    options = {"dataset": "sinusoid", "backbone": "mlp-4"} | options
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    with limited(resource.RLIMIT_AS, pages * resource.getpagesize() + 2**32):
        result = invoke(*words(tmp_path / "r", **options))
    assert result.exit_code == 1, result.output
    assert "fastkfo: not enough memory: " in result.output
    assert isinstance(result.exception, SystemExit)
    assert len(result.output.splitlines()) < 4


def test_a_disk_that_is_full(tmp_path):
    with limited(resource.RLIMIT_FSIZE, 4000):
        result = invoke(*words(tmp_path / "r"))
    assert result.exit_code == 1, result.output
    assert "last.pt" in flat(result.output).split("fastkfo: ")[1]
    assert isinstance(result.exception, SystemExit)
    assert not list((tmp_path / "r").glob("*.pt"))
    assert not list((tmp_path / "r").glob(".*.partial"))


@contextmanager
def limited(what, size):
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


def test_other_runtime_errors_are_not_hidden(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("something else")

    monkeypatch.setattr(Trainer, "_step", fail)
    result = invoke(*words(tmp_path / "r"))
    assert isinstance(result.exception, RuntimeError)


def test_evaluate_names_what_is_wrong(tmp_path):
    arguments = words(tmp_path / "r", iterations=1, validate_every=0, test_tasks=0)
    assert invoke(*arguments).exit_code == 0
    result = invoke("evaluate", tmp_path / "r", "--seed", 2**61)
    assert result.exit_code == 2
    assert "seed: expected at most" in flat(result.output)


def test_errors_of_files(tmp_path):
    (tmp_path / "c.yaml").write_text("wayz: 3")
    result = invoke("train", "--config", tmp_path / "c.yaml")
    assert (result.exit_code, "unknown wayz; expected some of method" in result.output) == (2, True)
    (tmp_path / "c.toml").write_text('ways = "3"')
    result = invoke("train", "--config", tmp_path / "c.toml")
    assert (result.exit_code, "ways: expected an int, got '3'" in result.output) == (2, True)
    (tmp_path / "bad.pt").write_bytes(b"PK")
    for words_ in (["evaluate", tmp_path / "bad.pt"], ["train", "--resume", tmp_path / "bad.pt"]):
        result = invoke(*words_)
        assert (result.exit_code, "is cut off or damaged" in result.output) == (1, True)
    result = invoke("evaluate", tmp_path / "x.pt", "--json", tmp_path / "none" / "e.json")
    assert result.exit_code == 2


def test_a_folder_that_holds_a_run(tmp_path):
    arguments = words(tmp_path / "r", iterations=1, validate_every=0, test_tasks=0)
    assert invoke(*arguments).exit_code == 0
    refused = invoke(*arguments)
    assert refused.exit_code == 2
    assert "already holds a run" in refused.output
    assert invoke(*arguments, "--overwrite").exit_code == 0
    other = invoke("train", "--resume", tmp_path / "r", "--method", "anil")
    assert other.exit_code == 1
    assert "method: the run in" in other.output


def test_divergence_ends_with_a_message(tmp_path):
    result = invoke(*words(tmp_path / "r", fast_lr=1e30, patience=3, method="maml"))
    assert result.exit_code == 1
    assert "3 iterations in a row" in result.output
    assert "iteration 1: no step" in result.output


def test_help_lists_what_there_is():
    text = flat(invoke("train", "--help").output)
    for word in ("maml-linnet", "cifar-fs", "anil-mi", "--hidden-kfo-layers", "--resume"):
        assert word in text
    assert "Raises" not in text
    assert "Args" not in text


def test_message_without_the_extra(monkeypatch, capsys):
    import sys

    monkeypatch.delitem(sys.modules, "fastkfo.cli.app")
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.setattr(sys, "argv", ["fastkfo", "train"])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 1
    assert "pip install --no-build-isolation '.[train]'" in capsys.readouterr().err
