"""The trainer: what it learns, how it goes on, what it refuses, what it does about a NaN."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F

from fastkfo.training import (
    Diverged,
    Evaluation,
    TrainConfig,
    Trainer,
    Watcher,
    evaluate,
    load_checkpoint,
)
from fastkfo.training.methods import build
from fastkfo.training.sources import load, settled
from tests.training_cases import metrics, same, small, stop_after


class Listen(Watcher):
    def __init__(self):
        self.validations, self.skips = [], []

    def validated(self, iteration, found, best):
        self.validations.append((iteration, found, best))

    def skipped(self, iteration, why):
        self.skips.append((iteration, why))


def test_a_run_leaves_what_it_says(tmp_path):
    listen = Listen()
    result = Trainer(small(tmp_path / "r"), watch=listen).run()
    files = {p.name for p in (tmp_path / "r").iterdir()}
    assert files == {".lock", "config.toml", "last.pt", "best.pt", "metrics.jsonl", "result.json"}
    assert (result.iteration, result.skipped, result.interrupted) == (6, 0, False)
    assert [at for at, *_ in listen.validations] == [3, 6]
    best = max(found.after.mean for _, found, _ in listen.validations)
    assert result.best == best
    assert load_checkpoint(tmp_path / "r" / "best.pt")["iteration"] == result.best_iteration
    lines = metrics(tmp_path / "r")
    assert [line["kind"] for line in lines].count("train") == 6
    assert [line["iteration"] for line in lines if line["kind"] == "validation"] == [3, 6]
    assert lines[-1]["kind"] == "test"
    written = json.loads((tmp_path / "r" / "result.json").read_text())
    assert written["test"]["after"] == result.test.after.mean
    assert written["best_validation"] == result.best


def test_the_best_weights_are_tested_and_the_last_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluation, "better_than", lambda self, best: best is None)
    trainer = Trainer(small(tmp_path / "r", fast_lr=1.0, meta_lr=0.1, test_tasks=20))
    result = trainer.run()
    assert result.best_iteration == 3
    best, last = (evaluate(tmp_path / "r" / f"{name}.pt", tasks=20) for name in ("best", "last"))
    assert best.after != last.after
    assert result.test.after == best.after
    found = trainer.built.learner.state_dict()
    assert same(dict(found), dict(load_checkpoint(tmp_path / "r")["learner"]))


def test_it_is_the_loop_that_anyone_would_write(tmp_path):
    """Six iterations, task after task: clone, adapt, backward, Adam."""
    config = small(tmp_path / "r", dtype="float64", validate_every=0, method="maml-kfo")
    Trainer(config).run()
    problem = load(config, ("train",))
    built = build(config, problem.shape, problem.outputs, problem.regression)
    optimizer = torch.optim.Adam(built.learner.parameters(), lr=config.meta_lr)
    for _ in range(6):
        episodes = problem.tasks["train"].sample(2)
        optimizer.zero_grad()
        for x_s, y_s, x_q, y_q in zip(*episodes, strict=True):
            learner = built.learner.clone()
            for _ in range(config.steps):
                learner.adapt(F.cross_entropy(learner(x_s), y_s))
            (F.cross_entropy(learner(x_q), y_q) / 2).backward()
        optimizer.step()
    found = load_checkpoint(tmp_path / "r")["learner"]
    for name, value in built.learner.state_dict().items():
        assert (found[name] - value).norm() <= 1e-9 * value.norm(), name


def test_it_learns(tmp_path):
    config = small(
        tmp_path / "r", ways=3, meta_batch=8, iterations=40, method="maml", shots=3, queries=5,
        fast_lr=0.5, meta_lr=0.01, backbone="plain-2x8", validate_every=0, test_tasks=100,
    )  # fmt: skip
    test = Trainer(config).run().test
    assert test.after.mean > 0.7
    assert abs(test.before.mean - 1 / 3) < 0.1


def test_a_folder_that_holds_a_run(tmp_path):
    Trainer(small(tmp_path / "r", iterations=2, seed=1)).run()
    with pytest.raises(ValueError, match=r"out: .* already holds a run"):
        Trainer(small(tmp_path / "r"))
    Trainer(small(tmp_path / "r", validate_every=0), overwrite=True).run()
    assert not (tmp_path / "r" / "best.pt").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        Trainer(small(tmp_path / "file"))
    (tmp_path / "file2").write_text("")
    with pytest.raises(ValueError, match="expected a folder that can be written to"):
        Trainer(small(tmp_path / "file2" / "r")).run()


def spoil(trainer, monkeypatch, where, when):
    """Makes the loss or a gradient not finite in some iterations."""
    loop = trainer.built.train
    forward, number = loop.forward, [0]

    def spoilt(*tasks):
        number[0] += 1
        out = forward(*tasks)
        if not when(number[0]):
            return out
        if where == "loss":
            return out._replace(loss=out.loss * float("nan"))
        parameter = next(trainer.built.learner.parameters())
        handle = parameter.register_hook(lambda g: (handle.remove(), g * float("inf"))[1])
        return out

    monkeypatch.setattr(loop, "forward", spoilt)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_no_step(where, tmp_path, monkeypatch):
    listen = Listen()
    config = small(tmp_path / "r", method="maml", backbone="strided-2x4", validate_every=0)
    trainer = Trainer(config, watch=listen)
    spoil(trainer, monkeypatch, where, lambda i: i == 6)
    states = []
    iterated = listen.iterated = lambda i, loss: states.append(_copy(trainer))
    result = trainer.run()
    assert iterated is listen.iterated
    assert result.skipped == 1
    assert [i for i, _ in listen.skips] == [6]
    assert ("meta-loss of nan" if where == "loss" else "meta-gradient") in listen.skips[0][1]
    assert same(states[4], states[5]), "weights, Adam's averages or running statistics moved"
    assert not same(states[3], states[4])
    train = [line for line in metrics(tmp_path / "r") if line["kind"] == "train"]
    assert [line["stepped"] for line in train] == [True] * 5 + [False]
    assert (train[-1]["loss"] is None) == (where == "loss")


def _copy(trainer):
    state = trainer.state()
    return torch.utils._pytree.tree_map(
        lambda t: t.clone() if isinstance(t, torch.Tensor) else t,
        {key: state[key] for key in ("learner", "optimizer")},
    )


def test_sinusoids_have_a_rate_of_their_own(tmp_path):
    for expected, options in ((0.01, {"dataset": "sinusoid"}), (0.1, {}), (2.0, {"fast_lr": 2})):
        config = small(tmp_path / "a", **({"backbone": "auto"} | options))
        assert Trainer(config).config.fast_lr == expected


def test_many_in_a_row_end_it(tmp_path, monkeypatch):
    trainer = Trainer(small(tmp_path / "r", patience=3, iterations=9, validate_every=0))
    spoil(trainer, monkeypatch, "loss", lambda i: i in (2, 3) or i >= 5)
    with pytest.raises(Diverged, match="3 iterations in a row, up to 7, had a meta-loss of nan"):
        trainer.run()
    assert len(metrics(tmp_path / "r")) == 7


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ways": 6}, ValueError, "ways: expected at most 5"),
        ({"queries": 1000}, ValueError, "shots \\+ queries: expected at most"),
        ({"dataset": "x"}, ValueError, "dataset: expected one of digits, sinusoid, omniglot"),
        ({"method": "x"}, ValueError, "method: expected one of maml"),
        ({"device": "cuda:99"}, ValueError, "device: expected"),
        ({"device": "tpu"}, ValueError, "device: expected cpu, cuda or cuda:N, got 'tpu'"),
        ({"wandb": True}, ModuleNotFoundError, "wandb: expected it to be installed"),
        ({"tensorboard": True}, ModuleNotFoundError, "tensorboard: expected it to be installed"),
    ],
    ids=str,
)
def test_errors_come_before_the_training(options, error, message, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    missing = ("wandb", "tensorboard")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in missing else find(name, *a)
    )
    with pytest.raises(error, match=message):
        Trainer(small(tmp_path / "r", **options))
    assert not (tmp_path / "r").exists()


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    Trainer(small(tmp_path / "r", tensorboard=True)).run()
    assert list((tmp_path / "r" / "tensorboard").glob("events*"))


def test_wandb_gets_the_metrics(tmp_path, monkeypatch):
    import importlib.util
    import types

    logged, begun = [], []

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            logged.append("finished")

    fake = types.ModuleType("wandb", "a stand-in")
    fake.init = lambda **options: (begun.append(options), Run())[1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: fake)
    Trainer(small(tmp_path / "r", wandb=True), **stop_after(3)).run()
    Trainer.resume(tmp_path / "r").run()
    assert begun[0]["id"] == begun[1]["id"]
    assert begun[0]["config"]["ways"] == 2
    steps = [
        step for step, values in filter(lambda x: x != "finished", logged) if "train/loss" in values
    ]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert logged.count("finished") == 2


def test_the_config_that_ran_is_written(tmp_path):
    from fastkfo.training import from_mapping, read_config

    options = {"iterations": 1, "meta_batch": 2, "test_tasks": 0}
    trainer = Trainer(TrainConfig(out=str(tmp_path / "r"), **options))
    trainer.run()
    config = from_mapping(read_config(tmp_path / "r" / "config.toml"))
    assert (config.backbone, config.fast_lr, config.adapt_transform) == ("auto", None, None)
    assert settled(config) == trainer.config
    assert from_mapping(load_checkpoint(tmp_path / "r")["config"]) == trainer.config
    assert trainer.config.backbone == "plain-2x16"
    Trainer.resume(tmp_path / "r", iterations=2).run()  # what was left open stays so
    again = from_mapping(read_config(tmp_path / "r" / "config.toml"))
    assert again == config.changed(iterations=2)
    plain = again.changed(method="maml", out=str(tmp_path / "plain"))
    assert Trainer(plain).config.adapt_transform is False
    hidden = again.changed(hidden_kfo_layers=1, out=str(tmp_path / "hidden"))
    assert Trainer(hidden).config.adapt_transform is False
    Trainer(hidden).run()
    (tmp_path / "hidden" / "config.toml").write_text('method = "anil"')  # of another run
    Trainer.resume(tmp_path / "hidden").run()
    kept = from_mapping(read_config(tmp_path / "hidden" / "config.toml"))
    assert kept == settled(hidden)
