"""What the tests of training share: a small run, and how to look at what is left of it."""

import json

import torch

from fastkfo.training import TrainConfig, Watcher, load_checkpoint

SMALL = {
    "ways": 2,
    "shots": 1,
    "queries": 2,
    "steps": 2,
    "meta_batch": 2,
    "iterations": 6,
    "validate_every": 3,
    "validation_tasks": 4,
    "checkpoint_every": 2,
    "test_tasks": 4,
    "backbone": "plain-2x4",
}


def small(out, **options):
    return TrainConfig(**(SMALL | {"out": str(out)} | options))


def words(out, **options):
    """The same as words of a command line."""
    found = ["train"]
    for name, value in (SMALL | {"out": str(out)} | options).items():
        flag = name.replace("_", "-")
        if value is True or value is False:
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            found += [f"--{flag}", str(value)]
    return found


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(a, b):
    """Whether two trees are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_same_run(one, other):
    """Everything two runs leave behind is equal, but for where they lie and how long they took."""
    for name in ("last.pt", "best.pt"):
        a, b = load_checkpoint(one / name), load_checkpoint(other / name)
        for state in (a, b):
            state["config"] = {k: v for k, v in state["config"].items() if k != "out"}
        different = [key for key in a if not same(a[key], b[key])]
        assert not different, (name, different)
    without = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in metrics(run)]
        for run in (one, other)
    ]
    assert without[0] == without[1]


def stop_after(iteration):
    """A stop, and what tells it how far the run is."""

    class Count(Watcher):
        done = 0

        def iterated(self, at, loss):
            self.done = at

    count = Count()
    return {"watch": count, "stop": lambda: count.done >= iteration}
