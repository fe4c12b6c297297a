"""Examples in docstrings give what they say.

A line that says `+SKIP` is not run, nor are examples of `NOT_HERE`.
"""

import doctest
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastkfo
from fastkfo.algorithms import MAML
from tests.documents import ROOT

pytestmark = pytest.mark.slow  # not once more on the reference

PUBLIC = (
    "algorithms", "data", "data.transforms", "data.samplers", "nn", "optim", "tasks", "training",
    "utils", "vision",
)  # fmt: skip
NOT_HERE = {
    "FewShotTasks.from_dataset": "a GPU",
    "OnDeviceDataset": "a GPU",
    "FewShotTasks.from_folder": "a data set",
    "load_plain": "a data set",
    "read_folder": "a data set",
    "get_tasksets": "a data set",
    "CIFARFS": "a data set",
    "FullOmniglot": "a data set",
    "MiniImagenet": "a data set",
    "evaluate": "a run",
    "TrainConfig": "a training",
    "Trainer": "a training",
}


def with_examples():
    """Every module with an example."""
    for path in sorted((ROOT / "fastkfo").rglob("*.py")):
        if ">>> " in path.read_text():
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def classes(labels, each=20):
    """A data set of images [1, 4, 4], so many of each class."""
    labels = torch.tensor(list(labels)).repeat_interleave(each)
    return TensorDataset(torch.randn(len(labels), 1, 4, 4), labels)


def names():
    """What readers have imported, and what stands for their own data and models."""
    found = {"fastkfo": fastkfo, "l2l": fastkfo, "torch": torch, "F": F, "nn": nn}
    for name in PUBLIC:
        module = importlib.import_module(f"fastkfo.{name}")
        found |= {public: getattr(module, public) for public in module.__all__}
    train, valid, test = classes(range(64)), classes(range(64, 80)), classes(range(80, 100))
    images, labels = classes(range(100)).tensors
    dataset = fastkfo.data.MetaDataset(train)
    model = nn.Linear(1, 1)
    own = {
        "train": train, "valid": valid, "test": test, "data": train, "dataset": dataset,
        "images": images, "labels": labels, "features": images.flatten(1),
        "taskset": fastkfo.data.Taskset(dataset, num_tasks=2), "model": model,
        "x": torch.randn(50, 4), "y": torch.arange(5).repeat_interleave(10),
        "inner_loop": fastkfo.InnerLoop(MAML(model, lr=0.1), F.mse_loss, 1),
    }  # fmt: skip
    return found | own | {"DataLoader": DataLoader, "TensorDataset": TensorDataset}


def examples(module):
    """The examples of a module, and the names of what they are of."""
    others = {name: thing for name, thing in names().items() if name not in vars(module)}
    for found in doctest.DocTestFinder().find(module, extraglobs=others):
        if found.examples:
            yield found.name.removeprefix(f"{module.__name__}."), found


@pytest.mark.parametrize("name", list(with_examples()))
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = dict(examples(importlib.import_module(name)))
    assert found
    for own, example in found.items():
        if own not in NOT_HERE:
            runner = doctest.DocTestRunner(
                optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            )
            assert not runner.run(example).failed, own


def test_what_is_not_run_exists():
    """A name that was renamed would be run, or never again."""
    known = {own for name in with_examples() for own, _ in examples(importlib.import_module(name))}
    assert set(NOT_HERE) <= known
