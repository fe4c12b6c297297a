"""Benchmarks: learn2learn's tasks from the same files and seed, where those are right."""

import importlib.util
import inspect
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import fastkfo
from tests import images
from tests.data_oracle import learn2learn_vision
from tests.oracle import learn2learn

oracle = learn2learn_vision()
benchmarks = fastkfo.vision.benchmarks
SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "drop_in_script.py"


def drawn(lib, name, root, count=3, **kwargs):
    random.seed(3)
    tasks = lib.get_tasksets(name, root=root, **kwargs)
    return tasks, [[task.sample() for _ in range(count)] for task in tasks]


def assert_same_tasks(mine, yours):
    for ours, theirs in zip(mine, yours, strict=True):
        for (x, y), (other_x, other_y) in zip(ours, theirs, strict=True):
            assert x.dtype == other_x.dtype
            assert torch.equal(x, other_x)
            assert torch.equal(y, other_y)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize(
    "sizes", [{}, {"train_ways": 3, "train_samples": 4, "test_ways": 2, "test_samples": 6}]
)
def test_cifarfs_tasks_are_learn2learns(tmp_path, sizes, device):
    root = images.cifarfs(tmp_path)
    _, yours = drawn(oracle.benchmarks, "cifarfs", root, device=device, **sizes)
    for name in ("cifarfs", "cifar-fs"):
        tasks, mine = drawn(benchmarks, name, root, device=device, **sizes)
        assert_same_tasks(mine, yours)
    assert tasks.train.sample()[0].shape[1:] == (3, 32, 32)
    assert 0 <= tasks.train.sample()[0].min() < 0.1 < tasks.test.sample()[0].max() <= 1


def test_many_validation_classes(tmp_path):
    """So many that the order in which a set lists labels depends on the transforms' order."""
    root = images.cifarfs(tmp_path, classes=(2, 60, 2), images=2)
    sizes = {"train_ways": 2, "train_samples": 2, "test_ways": 2, "test_samples": 2}
    found = []
    for lib in (benchmarks, oracle.benchmarks):
        tasks = lib.get_tasksets("cifarfs", root=root, **sizes).validation
        random.seed(7)
        found.append([tasks.sample() for _ in range(40)])
    assert_same_tasks(found[:1], found[1:])


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("augmentation", [None, "normalize"])
def test_mini_imagenet_tasks_are_learn2learns(tmp_path, augmentation, device):
    root = images.mini_imagenet(tmp_path)
    found = []
    for lib in (benchmarks, oracle.benchmarks):
        options = {
            "device": device,
            "data_augmentation": augmentation,
            "train_samples": 2,
            "test_samples": 2,
        }
        found.append(drawn(lib, "mini-imagenet", root, count=2, **options)[1])
    assert_same_tasks(*found)


def test_lee2019(tmp_path):
    root = images.mini_imagenet(tmp_path)
    tasks = benchmarks.get_tasksets(
        "mini-imagenet", root=root, data_augmentation="lee2019", num_tasks=1
    )
    (x, _), (again, _) = tasks.train[0], tasks.train[0]
    assert x.shape == again.shape == (50, 3, 84, 84)
    assert not torch.equal(x, again)
    # Uniform bytes: mean 127.5, deviation 74; of the test images nothing else changes.
    mean, std = np.array([120.396, 115.594, 104.540]), np.array([70.682, 68.276, 72.545])
    test = tasks.test[0][0]
    assert torch.equal(test, tasks.test[0][0])
    np.testing.assert_allclose(test.mean((0, 2, 3)), (127.5 - mean) / std, atol=0.01)
    np.testing.assert_allclose(test.std((0, 2, 3)), 73.9 / std, atol=0.01)
    assert x.min() >= (-mean / std).min() - 1e-5
    assert x.max() <= ((255 - mean) / std).max() + 1e-5
    brightest = torch.tensor((255 - mean) / std)[:, None, None]
    assert (x > brightest - 0.01).double().mean() < 0.4  # what was not scaled would all be there
    with pytest.raises(
        ValueError, match="data_augmentation: expected None, normalize or lee2019, got 'x'"
    ):
        benchmarks.get_tasksets("mini-imagenet", root=root, data_augmentation="x")


def omniglot_root(tmp_path):
    return images.omniglot(tmp_path, (("Latin", 8), ("Greek", 8), ("Tifinagh", 8)))


SMALL = {"train_ways": 3, "train_samples": 4, "test_ways": 1, "test_samples": 2}


def test_omniglot_classes_are_split_once(tmp_path):
    root = omniglot_root(tmp_path)
    tasks, found = drawn(benchmarks, "omniglot", root, **SMALL)
    labels = [set(task.dataset.labels) for task in tasks]
    assert [len(part) for part in labels] == [16, 2, 6]
    assert set().union(*labels) == set(range(24))
    classes = list(range(24))
    random.seed(3)
    random.shuffle(classes)
    assert [list(task.dataset.labels) for task in tasks] == [
        classes[:16],
        classes[16:18],
        classes[18:],
    ]
    # Every task is of its own part's classes: each of its images is one of that part's, rotated.
    every = [torch.stack([task.dataset[i][0] for i in range(len(task.dataset))]) for task in tasks]
    for part, drawn_tasks in enumerate(found):
        for x, _ in drawn_tasks:
            for image in x:
                turned = torch.stack([torch.rot90(image, k, (-2, -1)) for k in range(4)])
                here = [
                    bool((turned[:, None] == group[None]).flatten(2).all(2).any())
                    for group in every
                ]
                assert here == [part == other for other in range(3)]


def test_omniglot_split_is_learn2learns(monkeypatch):
    """Its benchmark on 1623 classes of one sample, beside ours."""

    class Characters(torch.utils.data.Dataset):
        def __len__(self):
            return 1623

        def __getitem__(self, i):
            return torch.zeros(1), i

    found = []
    for module in (oracle.datasets, fastkfo.vision.benchmarks.omniglot_benchmark):
        monkeypatch.setattr(module, "FullOmniglot", lambda *args, **kwargs: Characters())
    for lib in (oracle.benchmarks, benchmarks):
        random.seed(11)
        sets, _ = lib.omniglot_tasksets(1, 1, 1, 1, root="nowhere")
        found.append([part.labels for part in sets])
    assert found[0] == found[1]
    assert [len(part) for part in found[0]] == [1100, 100, 423]


def test_omniglot_images_and_rotations(tmp_path):
    """Tasks of one class, where learn2learn's late binding of the rotation does not show.

    It draws all tasks from all classes; so does ours here.
    """
    root = omniglot_root(tmp_path)
    one = {"train_ways": 1, "test_ways": 1, "train_samples": 3, "test_samples": 3}
    yours = oracle.benchmarks.get_tasksets("omniglot", root=root, **one).train
    whole = benchmarks.get_tasksets("omniglot", root=root, **one).train.dataset.dataset
    transforms = fastkfo.vision.benchmarks.omniglot_benchmark._transforms(whole, ways=1, samples=3)
    mine = fastkfo.data.Taskset(whole, transforms)
    for seed in range(8):
        found = []
        for tasks in (mine, yours):
            random.seed(seed)
            found.append(tasks.sample())
        assert_same_tasks([found[:1]], [found[1:]])
    assert found[0][0].shape == (3, 1, 28, 28)


def test_omniglot_on_a_device(tmp_path):
    tasks, _ = drawn(benchmarks, "omniglot", omniglot_root(tmp_path), device="cpu", **SMALL)
    inner = tasks.train.dataset.dataset.dataset
    assert isinstance(inner, fastkfo.data.OnDeviceDataset)
    assert inner.tensors[0].shape == (96, 1, 28, 28)


def test_plain_folders(tmp_path):
    for part in ("train", "validation", "test"):
        for name in ("omniglot", "cifar-fs", "mini-imagenet"):
            for c in range(2):
                path = tmp_path / name / part / f"{part}{c}"
                images.write_image(path / "0.png", 1 if name == "omniglot" else 3, seed=c)
                images.write_image(path / "1.jpg", 1 if name == "omniglot" else 3, seed=c + 2)
    sizes = {"train_ways": 2, "test_ways": 2, "train_samples": 2, "test_samples": 2}
    for name, shape in (
        ("omniglot", (1, 28, 28)),
        ("cifarfs", (3, 32, 32)),
        ("mini-imagenet", (3, 84, 84)),
    ):
        tasks, _ = drawn(benchmarks, name, str(tmp_path), **sizes)
        for part in tasks:
            x, y = part.sample()
            assert x.shape == (4, *shape)
            assert y.tolist() in ([0, 0, 1, 1], [1, 1, 0, 0])


def test_names_signatures_and_errors(tmp_path):
    assert benchmarks.list_tasksets() == ["omniglot", "mini-imagenet", "cifarfs"]
    assert set(benchmarks.list_tasksets()) < set(oracle.benchmarks.list_tasksets())
    for name in ("get_tasksets", "omniglot_tasksets", "cifarfs_tasksets", "mini_imagenet_tasksets"):
        wanted, got = [
            [
                (p.name, p.default, p.kind)
                for p in inspect.signature(getattr(lib, name)).parameters.values()
            ]
            for lib in (oracle.benchmarks, benchmarks)
        ]
        assert got == wanted
    assert benchmarks.BenchmarkTasksets._fields == oracle.benchmarks.BenchmarkTasksets._fields
    with pytest.raises(
        ValueError, match="name: expected one of omniglot, mini-imagenet, cifarfs, got 'fc100'"
    ):
        benchmarks.get_tasksets("fc100")
    root = images.cifarfs(tmp_path)
    with pytest.raises(TypeError, match="expected no further options, got data_augmentation"):
        benchmarks.get_tasksets("cifarfs", root=root, data_augmentation="lee2019")
    assert benchmarks.get_tasksets("cifarfs", root=root, data_augmentation=None)
    with pytest.raises(ValueError, match="n: expected at most 6, the labels there are, got 7"):
        benchmarks.get_tasksets("cifarfs", root=root, train_ways=7)
    for part in ("train", "test"):
        with pytest.raises(
            ValueError, match=f"{part}_samples: expected at most 12, the samples of class"
        ):
            benchmarks.get_tasksets("cifarfs", root=root, **{f"{part}_samples": 13})
    images.omniglot(tmp_path)
    with pytest.raises(ValueError, match=r"test_samples: expected at most 4, .* validation split"):
        benchmarks.get_tasksets("omniglot", root=root, train_samples=4, test_samples=5)
    assert len(benchmarks.get_tasksets("cifarfs", root=root, num_tasks=7).test) == 7


def run_script(text, name, root, iterations):
    spec = importlib.util.spec_from_loader(name, loader=None)
    module = importlib.util.module_from_spec(spec)
    exec(compile(text, name, "exec"), vars(module))
    # Of 5, 5, 4 and 32: float64 takes its time.
    module.SHOTS, module.STEPS, module.META_BATCH = 1, 3, 2
    module.CifarCNN.__init__.__defaults__ = (8, 2)
    return module.main(root, iterations)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_script_for_learn2learn(tmp_path, monkeypatch, double, capsys):
    """Nothing but its import differs, and its numbers are learn2learn's."""
    root = images.cifarfs(tmp_path)
    text = SCRIPT.read_text()
    assert text.count("fastkfo") == 1
    theirs = text.replace("import fastkfo as l2l", "import learn2learn as l2l")
    models = types.SimpleNamespace(**vars(oracle.models))
    conv_base = oracle.models.ConvBase
    # The signature that it had before 0.2.0.
    models.ConvBase = lambda output_size, **kwargs: conv_base(**kwargs)
    monkeypatch.setattr(oracle, "models", models)
    monkeypatch.setitem(sys.modules, "learn2learn", learn2learn())
    mine = run_script(text, "ours", root, 2)
    yours = run_script(theirs, "theirs", root, 2)
    assert mine == pytest.approx(yours, rel=1e-9)
    assert mine[0] != mine[1]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == lines[2:]
    assert len(text.splitlines()) < 80
