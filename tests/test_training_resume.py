"""Runs that go on: with the same bits, from the same states, as the same training."""

import random

import numpy as np
import pytest
import torch

from fastkfo.training import (
    CheckpointError,
    Trainer,
    backbones,
    load_checkpoint,
)
from fastkfo.training.checkpoints import save_checkpoint
from tests.training_cases import assert_same_run, metrics, same, small, stop_after


@pytest.mark.parametrize(
    "options",
    [
        {
            "method": "maml-kfo",
            "hidden_kfo_layers": 1,
            "backbone": "mlp-4",
            "adapt_transform": True,
        },
        {"method": "anil-kfo"},
        {"method": "meta-sgd", "first_order": True},
        {"dataset": "sinusoid", "method": "meta-curvature", "backbone": "mlp-8"},
        {"method": "anil", "backbone": "strided-2x4"},  # running statistics
    ],
    ids=lambda o: f"{o.get('dataset', 'digits')}-{o['method']}",
)
@pytest.mark.parametrize("at", [2, 3, 5])
def test_a_run_that_was_interrupted_ends_the_same(options, at, tmp_path):
    Trainer(small(tmp_path / "whole", **options)).run()
    first = Trainer(small(tmp_path / "parts", **options), **stop_after(at)).run()
    assert first.interrupted
    assert first.iteration == at
    assert first.test is None
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002 (others draw meanwhile)
    second = Trainer.resume(tmp_path / "parts").run()
    assert not second.interrupted
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:fastkfo. tasks run one after the other")
def test_random_draws_go_on_where_they_were(tmp_path, monkeypatch):
    """Dropout draws from PyTorch's global state, a layer of one's own from Python's or numpy's."""

    class Noise(torch.nn.Module):
        def forward(self, x):
            return x * (1 + 0.1 * random.random() + 0.1 * np.random.rand())  # noqa: NPY002

    def noisy(shape, sizes):
        return torch.nn.Sequential(
            *backbones.features("plain-2x4", shape)[0], torch.nn.Dropout(), Noise()
        )

    monkeypatch.setitem(backbones.BACKBONES, "noisy", (noisy, ""))
    options = {"backbone": "noisy-2x4", "method": "anil", "validate_every": 0}
    Trainer(small(tmp_path / "whole", **options)).run()
    Trainer(small(tmp_path / "parts", **options), **stop_after(3)).run()
    Trainer.resume(tmp_path / "parts").run()
    a, b = (load_checkpoint(tmp_path / name) for name in ("parts", "whole"))
    for key in ("learner", "features", "random"):
        assert same(a[key], b[key]), key


def test_random_states_of_the_caller_stay(tmp_path):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    Trainer(small(tmp_path / "r", seed=5)).run()
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert (before[2] == after[2]).all()


def test_lines_of_lost_iterations_are_removed(tmp_path):
    Trainer(small(tmp_path / "whole")).run()
    Trainer(small(tmp_path / "r"), **stop_after(4)).run()
    with (tmp_path / "r" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "iteration": 5, "loss": 1.0}\n{"kind": "tr')
    Trainer.resume(tmp_path / "r").run()
    assert_same_run(tmp_path / "r", tmp_path / "whole")


def test_stopped_before_the_first_iteration(tmp_path):
    Trainer(small(tmp_path / "whole")).run()
    assert Trainer(small(tmp_path / "r"), stop=lambda: True).run().iteration == 0
    Trainer.resume(tmp_path / "r").run()
    assert_same_run(tmp_path / "r", tmp_path / "whole")


def test_a_finished_run_is_tested_again(tmp_path):
    first = Trainer(small(tmp_path / "r")).run()
    again = Trainer.resume(tmp_path / "r").run()
    assert again.test.after == first.test.after
    assert [line["kind"] for line in metrics(tmp_path / "r")].count("test") == 1
    tests = Trainer.resume(tmp_path / "r", test_tasks=8).run().test.tasks
    assert tests == 8


def test_a_checkpoint_with_parts_that_do_not_fit(tmp_path):
    Trainer(small(tmp_path / "r", iterations=2)).run()
    state = load_checkpoint(tmp_path / "r")
    for key, value in (
        ("random", {}),
        ("random", {**state["random"], "torch": torch.zeros(3, dtype=torch.uint8)}),
        ("optimizer", {}),
        ("tasks", {"generator": None, "device": "cpu"}),
        ("validation", None),
    ):
        save_checkpoint(tmp_path / "bad.pt", {**state, key: value})
        before = torch.get_rng_state()
        with pytest.raises(CheckpointError, match="it does not go with this run"):
            Trainer.resume(tmp_path / "bad.pt")
        assert torch.equal(torch.get_rng_state(), before)


def adam(state, **changes):
    """The optimizer's state with one parameter's replaced in part."""
    optimizer = state["optimizer"]
    each = {**optimizer["state"], 1: {**optimizer["state"][1], **changes}}
    return {**optimizer, "state": each}


def without(mapping, key):
    return {k: v for k, v in mapping.items() if k != key}


def group(state, **changes):
    groups = [{**state["optimizer"]["param_groups"][0], **changes}]
    return {**state["optimizer"], "param_groups": groups}


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("iteration", lambda s: "x", "iteration: expected an int of at least 0, got 'x'"),
        ("iteration", lambda s: -5, "iteration: expected an int of at least 0, got -5"),
        ("iteration", lambda s: True, "iteration: expected an int"),
        ("iteration", lambda s: 1, "last_iteration: expected at most 1, got 2"),
        ("loss", lambda s: "x", "loss: expected a float, got 'x'"),
        ("validation", lambda s: s["validation"] | {"best": "x"}, "validation.best: expected a"),
        ("validation", lambda s: s["validation"] | {"best_iteration": 9}, "best_iteration"),
        ("validation", lambda s: without(s["validation"], "best"), "validation: expected best"),
        ("skipped", lambda s: s["skipped"] | {"all": 7}, "skipped.all: expected at most 2, got 7"),
        ("skipped", lambda s: s["skipped"] | {"in_a_row": 1}, "in_a_row: expected at most 0"),
        ("skipped", lambda s: 3, "skipped: expected all, in_a_row by name, got 3"),
        ("optimizer", lambda s: s["optimizer"] | {"state": {}}, "optimizer.state: expected"),
        ("optimizer", lambda s: adam(s, exp_avg=torch.zeros(3)), r"state\[1\].exp_avg: expected"),
        ("optimizer", lambda s: adam(s, exp_avg_sq=None), r"state\[1\].exp_avg_sq: expected"),
        ("optimizer", lambda s: adam(s, step=torch.tensor(9.0)), r"state\[1\].step: expected 2"),
        ("optimizer", lambda s: group(s, lr=9.0), "optimizer lr: expected 0.001, got 9.0"),
        ("optimizer", lambda s: group(s, params=[0]), "optimizer params: expected"),
    ],
)  # fmt: skip
def test_contents_that_no_training_leaves(key, change, message, two, tmp_path):
    save_checkpoint(tmp_path / "bad.pt", two | {key: change(two)})
    with pytest.raises(CheckpointError, match=message):
        Trainer.resume(tmp_path / "bad.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The checkpoint after two iterations."""
    folder = tmp_path_factory.mktemp("two") / "r"
    Trainer(small(folder, iterations=2, test_tasks=0)).run()
    return load_checkpoint(folder)


def test_validation_and_its_number_of_tasks_do_not_change_the_training(tmp_path):
    runs = []
    for i, options in enumerate([{}, {"validation_tasks": 7}, {"validate_every": 2}]):
        Trainer(small(tmp_path / str(i), **options)).run()
        runs.append(load_checkpoint(tmp_path / str(i)))
    for other in runs[1:]:
        for key in ("learner", "optimizer", "tasks", "random"):
            assert same(runs[0][key], other[key])


def test_options_that_would_make_it_another_run(tmp_path):
    Trainer(small(tmp_path / "r"), **stop_after(2)).run()
    for name, value in (("method", "anil"), ("fast_lr", 0.2), ("seed", 1), ("ways", 3)):
        with pytest.raises(CheckpointError, match=f"{name}: the run in .* was begun with"):
            Trainer.resume(tmp_path / "r", **{name: value})
    with pytest.raises(CheckpointError, match="out: the run in"):
        Trainer.resume(tmp_path / "r", out=str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match="changes: unknown wayz"):
        Trainer.resume(tmp_path / "r", wayz=3)
    result = Trainer.resume(tmp_path / "r", iterations=8, backbone="plain-2x4").run()
    assert result.iteration == 8


def test_a_folder_may_move(tmp_path):
    Trainer(small(tmp_path / "whole")).run()
    Trainer(small(tmp_path / "r"), **stop_after(4)).run()
    (tmp_path / "r").rename(tmp_path / "moved")
    assert Trainer.resume(tmp_path / "moved").run().folder == tmp_path / "moved"
    assert not (tmp_path / "r").exists()
    assert_same_run(tmp_path / "moved", tmp_path / "whole")
