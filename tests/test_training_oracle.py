"""The Trainer against learn2learn's own loop: the same weights, iteration after iteration."""

import pytest
import torch

from bench.training import CASES, gate, main, one_training
from bench.training_loops import Theirs
from tests.oracle import learn2learn

learn2learn()


@pytest.mark.parametrize("case", [c for c in CASES if c.theirs], ids=lambda case: case.name)
def test_three_iterations_are_learn2learns(case):
    assert gate(case) <= 1e-11


def test_both_are_tested_alike():
    options = {"iterations": 3, "meta_batch": 2, "test_tasks": 6}
    threads = torch.get_num_threads()
    try:
        rows = [one_training(CASES[0], 0, who, options) for who in ("fastkfo", "learn2learn")]
    finally:
        torch.set_num_threads(threads)
    assert rows[0]["after"] == pytest.approx(rows[1]["after"], abs=0.02)
    assert rows[0]["before"] == pytest.approx(rows[1]["before"], abs=0.02)


def test_what_learn2learn_has_not():
    case = next(case for case in CASES if not case.theirs)
    with pytest.raises(ValueError, match="no non-linear transform"):
        Theirs(case.config(), learn2learn())


@pytest.mark.parametrize("mode", ["rates", "accuracy"])
def test_the_command(mode, tmp_path, monkeypatch, capsys):
    from bench import records, training

    monkeypatch.setattr(training, "RESULTS", tmp_path)
    monkeypatch.setattr(training.machine, "ROOT", tmp_path)
    monkeypatch.setattr(training, "ProcessPoolExecutor", Here)
    monkeypatch.setattr("sys.argv", ["training", mode, "--methods", "anil-kfo", "--meta-batch", "2",
                                     "--rounds", "2", "--block", "1", "--seeds", "2",
                                     "--iterations", "2", "--test-tasks", "4"])  # fmt: skip
    main()
    text = capsys.readouterr().out
    assert "anil-kfo" in text
    (path,) = tmp_path.glob("*/training/*.json")
    (run,) = records.load(path)
    assert run["complete"]
    assert run["rows"][0]["gate"] <= 1e-9
    if mode == "accuracy":
        assert len(run["rows"][0]["runs"]["learn2learn"]) == 2


class Here:
    """An executor that does at once what it is given."""

    def __init__(self, processes, mp_context):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *arguments):
        value = function(*arguments)
        return type("Done", (), {"result": lambda self: value})()
