"""Configs: types and ranges, files, presets; the command's options are the config's fields."""

import os
import re
from dataclasses import fields

import pytest
import torch

from fastkfo.training import (
    PRESETS,
    TrainConfig,
    from_mapping,
    preset,
    random_states,
    read_config,
    write_config,
)
from fastkfo.training.config import SEEDS
from fastkfo.training.sources import load


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ways": "5"}, TypeError, "ways: expected an int, got '5'"),
        ({"steps": True}, TypeError, "steps: expected an int, got True"),
        ({"fast_lr": "x"}, TypeError, "fast_lr: expected a float, got 'x'"),
        ({"method": 3}, TypeError, "method: expected a str, got 3"),
        ({"first_order": 1}, TypeError, "first_order: expected a bool, got 1"),
        ({"adapt_transform": "yes"}, TypeError, "adapt_transform: expected a bool, got 'yes'"),
        ({"ways": None}, TypeError, "ways: expected an int, got None"),
        ({"ways": 1}, ValueError, "ways: expected at least 2, got 1"),
        ({"meta_batch": 0}, ValueError, "meta_batch: expected at least 1, got 0"),
        ({"fast_lr": 0.0}, ValueError, "fast_lr: expected a positive finite number, got 0.0"),
        ({"meta_lr": float("nan")}, ValueError, "meta_lr: expected a positive finite number"),
        ({"meta_lr": 1e300}, ValueError, "meta_lr: expected at most 1000000.0, got 1e+300"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        ({"seed": SEEDS}, ValueError, f"seed: expected at most {SEEDS - 1}, got {SEEDS}"),
        ({"steps": 10**30}, ValueError, "steps: expected at most 2147483647"),
        ({"dtype": "int8"}, ValueError, "dtype: expected float32 or float64, got 'int8'"),
        ({"test_tasks": 1}, ValueError, "test_tasks: expected 0 or at least 2"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_values(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        TrainConfig(**options)


def test_the_greatest_seed():
    """All that is seeded with what is made of it takes it."""
    problem = load(TrainConfig(seed=SEEDS - 1, dataset="sinusoid"))
    assert problem.tasks["test"].sample(1).x_s.shape == (1, 5, 1)
    random_states.seeded(SEEDS - 1, torch.device("cpu"))


def test_an_int_is_a_rate():
    assert TrainConfig(fast_lr=1).fast_lr == 1.0
    assert isinstance(TrainConfig(fast_lr=1).fast_lr, float)


def test_folder():
    assert str(TrainConfig().folder) == "fastkfo-runs/digits-maml-kfo-0"
    config = TrainConfig(method="anil", dataset="/data/birds/", seed=3)
    assert str(config.folder) == "fastkfo-runs/birds-anil-3"
    assert str(TrainConfig(out="x/y").folder) == "x/y"


@pytest.mark.parametrize("adapt", [None, True, False])
def test_what_is_written_is_read(adapt, tmp_path):
    config = TrainConfig(dataset='a "b"\\\n\x7fé', meta_lr=3e-7, adapt_transform=adapt)
    write_config(tmp_path / "c.toml", config)
    assert from_mapping(read_config(tmp_path / "c.toml")) == config


def test_yaml_and_toml(tmp_path):
    (tmp_path / "a.yaml").write_text("ways: 3\nfast-lr: 0.5\nfirst_order: true\n")
    (tmp_path / "a.toml").write_text("ways = 3\nfast-lr = 0.5\nfirst_order = true\n")
    expected = {"ways": 3, "fast_lr": 0.5, "first_order": True}
    assert read_config(tmp_path / "a.yaml") == read_config(tmp_path / "a.toml") == expected
    (tmp_path / "empty.yml").write_text("")
    assert read_config(tmp_path / "empty.yml") == {}


@pytest.mark.parametrize("text", ["1e-2", "1E-2", "1.0e-2", "+.1e-1", "10.e-3", "0.01"])
def test_numbers_of_yaml(text, tmp_path):
    (tmp_path / "a.yaml").write_text(f"fast_lr: {text}\nways: 3\nout: 1e-2x\nroot: e5\n")
    expected = {"fast_lr": 0.01, "ways": 3, "out": "1e-2x", "root": "e5"}
    assert read_config(tmp_path / "a.yaml") == expected


def test_a_config_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "c.toml"
    write_config(path, TrainConfig(seed=1))

    def fail(source, target):
        raise OSError("not now")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="not now"):
        write_config(path, TrainConfig(seed=2))
    assert from_mapping(read_config(path)).seed == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "wayz: 3", "unknown wayz; expected some of method, dataset"),
        ("a.toml", "wayz = 3", "unknown wayz; expected some of method, dataset"),
        ("a.yaml", "- 1", "expected keys and values in .*, got list"),
        ("a.yaml", "{", "expected YAML in"),
        ("a.yaml", "!!python/object/apply:os.system ['exit 3']", "expected YAML in"),
        ("a.toml", "ways = ", "expected TOML in"),
        ("a.json", "{}", "expected a .yaml, .yml or .toml file"),
        ("a.toml", b"\xff", "expected a file that can be read"),
    ],
)
def test_bad_files(name, text, message, tmp_path):
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / name)
    with pytest.raises(ValueError, match="expected a file that can be read"):
        read_config(tmp_path / "none.toml")


def test_presets():
    for name in PRESETS:
        config = TrainConfig(**preset(name))
        assert (config.ways, config.shots, config.steps, config.meta_batch) == (5, 5, 5, 16)
    scripts = {
        "maml-cfs": ("maml-kfo", "cifar-fs", "mean-2x32", 0.1, 0.0005, 20_000),
        "anil-cfs": ("anil-kfo", "cifar-fs", "mean-2x32", 0.1, 0.001, 20_000),
        "maml-mi": ("maml-kfo", "mini-imagenet", "pool-4x32", 0.001, 0.0005, 20_000),
        "anil-mi": ("anil-kfo", "mini-imagenet", "pool-4x64", 0.05, 0.001, 3_500),
    }
    for name, values in scripts.items():
        c = TrainConfig(**preset(name))
        found = (c.method, c.dataset, c.backbone, c.fast_lr, c.meta_lr, c.iterations)
        assert found == values
    with pytest.raises(ValueError, match="preset: expected one of maml-cfs, anil-cfs"):
        preset("maml")


def test_every_field_says_what_it_is():
    assert all(each.metadata["help"].endswith(".") for each in fields(TrainConfig))
