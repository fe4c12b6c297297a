"""Data sets by name and folders of images: the tasks they give, and why they may not."""

import pytest
import torch

from fastkfo.training import TrainConfig, evaluate
from fastkfo.training import sources as training_sources
from fastkfo.training.sources import SPLITS, load
from fastkfo.training.trainer import Trainer
from fastkfo.training.vision_sources import mini_imagenet
from tests.training_cases import small

Image = pytest.importorskip("PIL.Image")


def images(folder, classes, count, size=(8, 8), mode="RGB"):
    """Folders of images, each of one colour, which says class and number."""
    for c in range(classes):
        of_class = folder / f"{folder.name}{c}"
        of_class.mkdir(parents=True)
        for i in range(count):
            colour = (40 * c, 10 * i, 7) if mode == "RGB" else 10 * c
            Image.new(mode, size, colour).save(of_class / f"{i}.png")


@pytest.fixture
def folder(tmp_path):
    for split in SPLITS:
        images(tmp_path / "birds" / split, 3, 4)
    return tmp_path / "birds"


def test_a_folder(folder, tmp_path):
    options = {"dataset": str(folder), "backbone": "plain-2x4", "method": "anil"}
    problem = load(small("x", **options))
    assert (problem.shape, problem.outputs, problem.regression) == ((3, 8, 8), 2, False)
    x_s, y_s, x_q, _ = problem.tasks["train"].sample(5)
    assert x_s.shape == (5, 2, 3, 8, 8)
    assert x_q.shape == (5, 4, 3, 8, 8)
    assert y_s.tolist() == [[0, 1]] * 5
    assert 0 < x_s.max() <= 1
    assert x_s.dtype == torch.float32
    result = Trainer(small(tmp_path / "r", **options)).run()
    assert evaluate(result.folder, tasks=4).after == result.test.after
    resized = load(small("x", **options, image_size=6))
    assert resized.shape == (3, 6, 6)


def test_a_folder_that_will_not_do(folder):
    for options, message in (
        ({"ways": 4}, r"ways: .*\(in the train split of"),
        ({"queries": 4}, r"shots \+ queries: .* the images of class 'train0', .* the train split"),
    ):
        with pytest.raises(ValueError, match=message):
            load(small("x", dataset=str(folder), **options))
    (folder / "test" / "test1" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"test1/0.png"):
        load(small("x", dataset=str(folder)))
    (folder / "validation").rename(folder / "other")
    with pytest.raises(ValueError, match=r"train, validation, test.*; validation not found"):
        load(small("x", dataset=str(folder)))


def test_a_class_in_two_splits(folder):
    (folder / "test" / "test1").rename(folder / "test" / "train0")
    with pytest.raises(
        ValueError, match="every class in one split, got 'train0' in train and test"
    ):
        load(small("x", dataset=str(folder)))


def test_sinusoids():
    problem = load(small("x", dataset="sinusoid", backbone="auto", dtype="float64"))
    assert (problem.shape, problem.outputs, problem.regression) == ((1,), 1, True)
    assert problem.tasks["train"].sample(2).x_s.dtype == torch.float64


def test_splits_and_seeds_draw_from_streams_of_their_own():
    seeds = {
        training_sources.seed_of(TrainConfig(seed=seed), split)
        for seed in range(5)
        for split in SPLITS
    }
    assert len(seeds) == 15


def test_a_look_at_the_shapes_draws_nothing():
    a = load(small("x")).tasks["train"].sample(3)
    b = load(small("x"), ("validation", "train")).tasks["train"].sample(3)
    assert torch.equal(a.x_q, b.x_q)


def test_omniglot(tmp_path, monkeypatch):
    for part in ("images_background", "images_evaluation"):
        images(tmp_path / "omniglot-py" / part / "alphabet", 6, 3, (105, 105), "L")
    split = training_sources.split_classes
    monkeypatch.setattr(
        training_sources, "split_classes", lambda labels, sizes, seed: split(labels, (4, 4, 4))
    )
    problem = load(small("x", dataset="omniglot", root=str(tmp_path), backbone="auto"))
    assert problem.shape == (1, 28, 28)
    tasks = problem.tasks
    assert [len(tasks[split].classes) for split in SPLITS] == [4, 4, 4]
    assert not set(tasks["train"].classes) & set(tasks["test"].classes)
    assert tasks["train"].rotations == 4
    assert tasks["train"].sample(8).x_s.min() >= (255 - 50) / 255 - 1e-6  # inverted


def test_omniglot_in_folders_of_splits(tmp_path):
    for split in SPLITS:
        images(tmp_path / "omniglot" / split, 3, 3, (105, 105), "L")
    tasks = load(small("x", dataset="omniglot", root=str(tmp_path))).tasks
    for split in SPLITS:
        assert tasks[split].rotations == 4
        assert len(tasks[split].classes) == 3
    assert tasks["test"].sample(8).x_s.min() >= (255 - 20) / 255 - 1e-6  # inverted
    with pytest.raises(ValueError, match=r"images of class 'train0', .*in the train split"):
        load(small("x", dataset="omniglot", root=str(tmp_path), queries=4))


def test_omniglot_of_fewer_classes_is_split_in_proportion(tmp_path):
    for part in ("images_background", "images_evaluation"):
        images(tmp_path / "omniglot-py" / part / "alphabet", 16, 3, (28, 28), "L")
    tasks = load(small("x", dataset="omniglot", root=str(tmp_path))).tasks
    assert [len(tasks[split].classes) for split in SPLITS] == [22, 2, 8]


def test_cifar_fs(tmp_path):
    for split in SPLITS:
        images(tmp_path / "cifar-fs" / split, 3, 3, (32, 32))
    problem = load(small("x", dataset="cifar-fs", root=str(tmp_path)))
    assert problem.shape == (3, 32, 32)
    assert problem.tasks["test"].sample(1).x_q.shape == (1, 4, 3, 32, 32)
    with pytest.raises(FileNotFoundError, match=r"CIFAR-FS: not found"):
        load(small("x", dataset="cifar-fs", root=str(tmp_path / "none")))


def test_mini_imagenet(tmp_path):
    for split in SPLITS:
        images(tmp_path / "mini-imagenet" / split, 2, 3, (84, 84))
    config = small("x", dataset="mini-imagenet", root=str(tmp_path))
    data = mini_imagenet(config, "train")
    assert data.images.dtype == torch.uint8
    assert data.images[:, :, 0, 0].tolist() == [
        [40 * c, 10 * i, 7] for c in (0, 1) for i in (0, 1, 2)
    ]
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert load(config).shape == (3, 84, 84)
