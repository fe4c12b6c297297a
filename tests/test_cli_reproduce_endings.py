"""`fastkfo reproduce`: one seed, a folder that is not empty, what is missing, an early end."""

import sys
import time
from dataclasses import replace
from multiprocessing import active_children

import pytest
from typer.testing import CliRunner

from fastkfo.cli import reproduce_jobs
from fastkfo.cli.app import app
from fastkfo.cli.reproduce import FILES
from tests.test_cli_reproduce import BY_NAME, invoke


@pytest.fixture
def untrained(monkeypatch):
    """Whoever trains fails."""

    def refuse(*args):
        raise AssertionError("training started")

    monkeypatch.setattr(reproduce_jobs, "examine", refuse)


def words(result):
    return " ".join(result.output.replace("│", " ").split())


def overwriting(out):
    command = ["reproduce", "--quick", "--overwrite", "--processes=1", "--out", str(out)]
    return CliRunner().invoke(app, command)


def test_one_seed_has_no_interval(tmp_path):
    result = invoke(tmp_path, seeds=1)
    assert result.exit_code == 0, result.output
    texts = {name: (tmp_path / name).read_text() for name in FILES if not name.endswith("png")}
    for text in (result.output, *texts.values()):
        assert "nan" not in text.lower()
        assert "±" not in text
    assert "From one seed" in texts["report.md"]
    assert "1 seeds" not in texts["report.md"]


def test_an_earlier_result_is_kept(tmp_path, untrained):
    for name in FILES:
        (tmp_path / name).write_text("{}")
    result = invoke(tmp_path)
    assert result.exit_code == 2
    assert "already holds a result; replace it with --overwrite" in words(result)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"{}"}
    assert "training started" in str(overwriting(tmp_path).exception)


def test_other_files_are_never_joined(tmp_path, untrained):
    (tmp_path / "report.md").write_text("mine")
    for result in (invoke(tmp_path), overwriting(tmp_path)):
        assert result.exit_code == 2
        assert "expected an empty folder or one with an earlier result" in words(result)
    assert (tmp_path / "report.md").read_text() == "mine"


def test_digits_that_are_missing_are_told_before_the_training(tmp_path, untrained, monkeypatch):
    for name in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    result = invoke(tmp_path)
    assert result.exit_code == 1
    assert "needs scikit-learn" in words(result)


def test_an_end_does_not_wait_for_what_was_begun():
    problem = replace(BY_NAME["digits"], iterations=10**6)
    others, end = set(active_children()), time.monotonic() + 4
    done = reproduce_jobs.run([problem], 2, 2, lambda: time.monotonic() < end, lambda *_: None)
    assert done == []
    while left := set(active_children()) - others:
        assert time.monotonic() < end + 10, left
        time.sleep(0.05)
