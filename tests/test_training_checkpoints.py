"""Checkpoints: whole or not at all, never run, and what is wrong with one is said."""

import os
import pickle
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from fastkfo.training import CheckpointError, Trainer, evaluate, load_checkpoint
from fastkfo.training.checkpoints import FORMAT, save_checkpoint
from tests.training_cases import assert_same_run, same, small

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "r"
    Trainer(small(folder)).run()
    return folder


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def damaged(kind, run, path):
    """A file that is no good checkpoint."""
    data = (run / "last.pt").read_bytes()
    state = load_checkpoint(run / "last.pt")
    if kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "bytes":
        path.write_bytes(b"not a checkpoint at all")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "malicious":
        torch.save(state | {"extra": Malicious(path.parent / "pwned")}, path)
    elif kind == "malicious pickle":
        path.write_bytes(pickle.dumps(Malicious(path.parent / "pwned")))
    elif kind == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    elif kind == "newer":
        torch.save(state | {"format": FORMAT + 1, "fastkfo": "9.9"}, path)
    elif kind == "lacks":
        torch.save({k: v for k, v in state.items() if k != "optimizer"}, path)
    return path


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "which is not there"),
        ("cut", "is cut off or damaged"),
        ("bytes", "is no checkpoint"),
        ("empty", "is no checkpoint"),
        ("malicious", "could run code, so it is not read"),
        ("malicious pickle", "could run code: it is not read"),
        ("other", "fastkfo did not write it"),
        ("newer", f"format {FORMAT + 1}, written by fastkfo 9.9"),
        ("lacks", "lacks optimizer"),
    ],
)
def test_bad_checkpoints(kind, message, run, tmp_path):
    path = damaged(kind, run, tmp_path / "last.pt")
    for use in (load_checkpoint, evaluate, Trainer.resume):
        with pytest.raises(CheckpointError, match=message):
            use(path)
    assert not (tmp_path / "pwned").exists()


def test_one_flipped_bit_is_noticed(run, tmp_path):
    """In what the checksums guard; elsewhere in the file nothing may come of it."""
    data, whole = (run / "last.pt").read_bytes(), load_checkpoint(run / "last.pt")
    path, messages = tmp_path / "last.pt", []
    for bit in torch.randint(8 * len(data), (60,), generator=torch.Generator().manual_seed(0)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << int(bit % 8)
        path.write_bytes(flipped)
        try:
            assert same(load_checkpoint(path), whole)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(re.search(r"last.pt is (damaged|cut off|no checkpoint)", text) for text in messages)
    at = data.index(b"plain-2x4")  # one that PyTorch alone would read
    path.write_bytes(data[:at] + b"plain-2x5" + data[at + 9 :])
    for use in (load_checkpoint, evaluate, Trainer.resume):
        with pytest.raises(CheckpointError, match=r"last.pt is damaged"):
            use(path)


def test_another_architecture_is_named(run, tmp_path):
    state = load_checkpoint(run / "last.pt")
    state["config"] = {**state["config"], "backbone": "plain-2x5"}
    save_checkpoint(tmp_path / "a.pt", state)
    message = r"another architecture, the learner in it has module.0.weight float32\[4, 1, 3, 3\]"
    for use in (evaluate, Trainer.resume):
        with pytest.raises(CheckpointError, match=message):
            use(tmp_path / "a.pt")
    state["config"] = {
        **state["config"],
        "backbone": "plain-2x4",
        "method": "anil",
        "adapt_transform": False,
    }
    save_checkpoint(tmp_path / "b.pt", state)
    with pytest.raises(CheckpointError, match=r"the learner in it lacks module\.weight"):
        evaluate(tmp_path / "b.pt")
    state["config"] = {**state["config"], "wayz": 3}
    save_checkpoint(tmp_path / "c.pt", state)
    with pytest.raises(CheckpointError, match="its config cannot be used: checkpoint: unknown way"):
        evaluate(tmp_path / "c.pt")


def test_only_plain_values_are_in_it(run):
    state = load_checkpoint(run)
    assert state["format"] == FORMAT
    assert state["iteration"] == 6
    assert next(iter(state["learner"])) == "module.0.weight"
    assert set(state["random"]) == {"torch", "cuda", "python", "numpy"}
    assert (run / "last.pt").stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pt", {"iteration": 1})
    before = (tmp_path / "a.pt").read_bytes()

    def fail(state, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path / "a.pt", {"iteration": 2})
    assert (tmp_path / "a.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_the_name_changes_hands_in_one_step(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pt", {"iteration": 1})
    before = (tmp_path / "a.pt").read_bytes()

    def fail(source, target):
        assert zipfile.is_zipfile(source)
        raise OSError("not now")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="not now"):
        save_checkpoint(tmp_path / "a.pt", {"iteration": 2})
    assert (tmp_path / "a.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_killed_while_a_checkpoint_is_written(run, tmp_path):
    """Half of the new file is on disk, and the process is gone: the old one is there, whole."""
    folder = tmp_path / "r"
    code = f"""
import os, sys, time, torch
from fastkfo.training import Trainer, checkpoints
from tests.training_cases import small
write_whole, calls = checkpoints.write_whole, []
def slow(path, write):
    calls.append(path)
    if len(calls) < 4:
        return write_whole(path, write)
    write_whole(path, lambda file: write(Half(file)))
class Half:
    def __init__(self, file):
        self.file = file
    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        os.fsync(self.file.fileno())
        print("writing", len(calls), flush=True)
        time.sleep(600)
checkpoints.write_whole = slow
Trainer(small({str(folder)!r}, validate_every=0, checkpoint_every=1)).run()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=_env()
    )
    try:
        assert process.stdout.readline().split() == ["writing", "4"]
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    finally:
        process.kill()
    assert len(list(folder.glob(".last.pt.*.partial"))) == 1
    assert load_checkpoint(folder)["iteration"] == 3
    Trainer.resume(folder).run()
    assert not list(folder.glob(".*.partial"))
    a, b = load_checkpoint(folder), load_checkpoint(run)
    assert same(a["learner"], b["learner"])
    assert same(a["optimizer"], b["optimizer"])


def test_killed_between_checkpoints(run, tmp_path):
    """SIGKILL in the middle of a run; what goes on from there ends with the same bits."""
    folder = tmp_path / "r"
    code = f"""
import sys, time
from fastkfo.training import Trainer, Watcher
from tests.training_cases import small
class Wait(Watcher):
    def iterated(self, iteration, loss):
        if iteration == 5:
            print(iteration, flush=True)
            time.sleep(600)
Trainer(small({str(folder)!r}), watch=Wait()).run()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=_env()
    )
    try:
        assert process.stdout.readline().strip() == "5"
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    finally:
        process.kill()
    assert load_checkpoint(folder)["iteration"] == 4
    Trainer.resume(folder).run()
    assert_same_run(folder, run)


def _env():
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # As many threads as here: a sum is rounded by how it is split among them.
    threads = str(torch.get_num_threads())
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": threads}


def _umask():
    current = os.umask(0)
    os.umask(current)
    return current
