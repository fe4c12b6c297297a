"""The run folder: one run at a time, the best checkpoint its own, nothing lost without a word."""

import shutil

import pytest

from fastkfo.training import CheckpointError, Evaluation, Trainer, evaluate, load_checkpoint
from fastkfo.training import trainer as training_trainer
from fastkfo.training.checkpoints import save_checkpoint
from fastkfo.training.sources import load
from tests.training_cases import assert_same_run, metrics, small, stop_after


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One that stopped after iteration 4, its best at iteration 3."""
    folder = tmp_path_factory.mktemp("run") / "r"
    Trainer(small(folder), **stop_after(4)).run()
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "r")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The best checkpoint of another run."""
    folder = tmp_path_factory.mktemp("other") / "r"
    Trainer(small(folder, iterations=3, test_tasks=0, seed=1)).run()
    return folder / "best.pt"


def spoil(kind, copy, other):
    best = copy / "best.pt"
    if kind == "cut":
        best.write_bytes(best.read_bytes()[:-100])
    elif kind == "missing":
        best.unlink()
    elif kind == "other iteration":
        save_checkpoint(best, {**load_checkpoint(best), "iteration": 2})
    elif kind == "other run":
        shutil.copy(other, best)


BEST = pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "best.pt is cut off or damaged"),
        ("missing", "best.pt, which is not there"),
        ("other iteration", "best.pt of iteration 3, the best one, got that of iteration 2"),
        ("other run", "best.pt is of another run, seed in it is 1, expected 0"),
    ],
)


@BEST
def test_a_best_checkpoint_that_is_not_the_runs(kind, message, copy, other):
    before = (copy / "last.pt").read_bytes()
    spoil(kind, copy, other)
    with pytest.raises(CheckpointError, match=message):
        Trainer.resume(copy)
    assert (copy / "last.pt").read_bytes() == before


@BEST
def test_it_is_not_tested_either(kind, message, copy, other, monkeypatch):
    trainer = Trainer.resume(copy, validate_every=0, iterations=5)
    step = trainer._step
    monkeypatch.setattr(trainer, "_step", lambda: (step(), spoil(kind, copy, other)))
    with pytest.raises(CheckpointError, match=message):
        trainer.run()
    assert not (copy / "result.json").exists()
    assert load_checkpoint(copy)["iteration"] == 5  # nothing of the training is lost


def test_a_folder_without_its_best_is_not_evaluated(copy):
    (copy / "best.pt").unlink()
    with pytest.raises(CheckpointError, match=r"has no best.pt; name .*last.pt to evaluate that"):
        evaluate(copy, tasks=2)
    assert evaluate(copy / "last.pt", tasks=2).tasks == 2


@pytest.mark.parametrize("at", [3, 6], ids=["first", "second"])
def test_killed_between_the_last_and_the_best(at, tmp_path, monkeypatch):
    """Both have the same content then, so that the one is written from the other."""
    monkeypatch.setattr(Evaluation, "better_than", lambda self, best: True)
    Trainer(small(tmp_path / "whole")).run()
    save = training_trainer.save_checkpoint

    def killed(path, state):
        if path.name == "best.pt" and state["iteration"] == at:
            raise KeyboardInterrupt
        save(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(training_trainer, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            Trainer(small(tmp_path / "r")).run()
    Trainer.resume(tmp_path / "r").run()
    assert_same_run(tmp_path / "r", tmp_path / "whole")


def test_one_run_at_a_time(tmp_path):
    config = small(tmp_path / "r")
    second, over = Trainer(config), Trainer(config, overwrite=True)
    asked = []

    def meanwhile():
        if not asked:
            asked.append(1)
            (tmp_path / "r" / ".last.pt.x.partial").write_text("being written")
            for other in (second, over):
                with pytest.raises(ValueError, match="out: another training is running in"):
                    other.run()
            assert (tmp_path / "r" / ".last.pt.x.partial").exists()
        return False

    assert Trainer(config, stop=meanwhile).run().iteration == 6
    with pytest.raises(ValueError, match="already holds a run"):
        second.run()  # it was free when this one was made
    assert asked
    assert over.run().iteration == 6


def test_a_run_that_went_on_elsewhere_meanwhile(copy):
    one, other = Trainer.resume(copy), Trainer.resume(copy)
    assert one.run().iteration == 6
    with pytest.raises(CheckpointError, match=r"another training wrote .*last.pt meanwhile"):
        other.run()
    assert one.run().iteration == 6


def test_going_on_from_an_earlier_checkpoint(copy, tmp_path):
    lines = metrics(copy)
    with pytest.raises(CheckpointError, match=r"expected .*last.pt, from which that run goes on"):
        Trainer.resume(copy / "best.pt")
    assert metrics(copy) == lines
    (tmp_path / "new").mkdir()
    shutil.copy(copy / "best.pt", tmp_path / "new")
    trainer = Trainer.resume(tmp_path / "new" / "best.pt")
    assert trainer.iteration == 3
    assert trainer.run().iteration == 6


def test_fewer_iterations_than_are_done(copy):
    files = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(CheckpointError, match=r"iterations: expected at least 4, .*, got 3"):
        Trainer.resume(copy, iterations=3)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == files
    first = Trainer.resume(copy, iterations=4).run()
    assert first.loss == Trainer.resume(copy).run().loss  # not NaN, which is null in result.json


def test_the_device_stays(copy):
    with pytest.raises(CheckpointError, match=r"device: the run in .* was begun with 'cpu'"):
        Trainer.resume(copy, device="cuda")


def test_a_folder_that_cannot_be_written_is_noticed_first(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(
        "fastkfo.training.sources.load", lambda config: read.append(config) or load(config)
    )
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "r", "/proc/nothing/r", tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match="out: expected a folder that can be written to"):
            Trainer(small(out))
        with pytest.raises(ValueError, match="out: expected a folder that can be written to"):
            Trainer(small(out), overwrite=True)
    assert not read
