"""Data sets: as learn2learn's on the same files; missing, broken and hostile files; downloads."""

import inspect
import os
import shutil
import sys
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import fastkfo
from fastkfo import data
from fastkfo.data.unpickling import UnsafePickleError
from fastkfo.vision import datasets
from fastkfo.vision.datasets import full_omniglot
from fastkfo.vision.images import pixels, read_image, resized, to_tensor
from tests import images
from tests.data_oracle import learn2learn_vision

oracle = learn2learn_vision()
MODES = ("train", "validation", "test")


def same_samples(mine, yours):
    assert len(mine) == len(yours)
    for i in range(len(mine)):
        (x, y), (other_x, other_y) = mine[i], yours[i]
        assert type(y) is type(other_y)
        assert y == other_y
        if isinstance(x, torch.Tensor):
            assert x.dtype == other_x.dtype
            assert torch.equal(x, other_x)
        else:
            assert x.mode == other_x.mode
            np.testing.assert_array_equal(np.asarray(x), np.asarray(other_x))
    assert data.MetaDataset(mine).indices_to_labels == {i: yours[i][1] for i in range(len(yours))}


def test_signatures():
    for name in ("FullOmniglot", "CIFARFS", "MiniImagenet"):
        wanted, got = [
            [(p.name, p.default) for p in inspect.signature(getattr(lib, name)).parameters.values()]
            for lib in (oracle.datasets, datasets)
        ]
        assert got == wanted


def test_omniglot(tmp_path):
    root = images.omniglot(tmp_path)
    mine, yours = datasets.FullOmniglot(root), oracle.datasets.FullOmniglot(root)
    same_samples(mine, yours)
    assert mine._bookkeeping_path == yours._bookkeeping_path
    assert mine.classes[0] == "Greek/character00"
    halved = datasets.FullOmniglot(root, transform=to_tensor, target_transform=lambda y: y // 2)
    assert halved[20][0].shape == (1, 30, 30)
    assert data.MetaDataset(halved).labels == list(range(6))


@pytest.mark.parametrize("mode", MODES)
def test_cifarfs(tmp_path, mode):
    root = images.cifarfs(tmp_path, classes=(3, 2, 2), images=3)
    mine, yours = datasets.CIFARFS(root, mode), oracle.datasets.CIFARFS(root, mode)
    same_samples(mine, yours)
    assert mine.classes == yours.classes
    assert mine.samples == yours.samples
    assert mine._bookkeeping_path == yours._bookkeeping_path


def cifar100(tmp_path, name="cifarfs.zip"):
    """The zip file, with classes that two splits share no more than their names do."""
    raw = tmp_path / "made" / "cifar100"
    for label, part in enumerate(("train", "train", "val", "test")):
        for i in range(2):
            images.write_image(raw / "data" / f"c{3 - label}" / f"{i}.png", seed=10 * label + i)
        lists = raw / "splits" / "bertinetto" / f"{part}.txt"
        lists.parent.mkdir(parents=True, exist_ok=True)
        with open(lists, "a") as file:
            file.write(f"c{3 - label}\n")
    root = tmp_path / "root"
    root.mkdir()
    with zipfile.ZipFile(root / name, "w") as archive:
        for path in sorted(raw.rglob("*")):
            archive.write(path, path.relative_to(raw.parent))
    return root


@pytest.mark.parametrize("name", ["cifarfs.zip", "cifar100.zip"])
def test_cifarfs_from_its_archive(tmp_path, name):
    root = cifar100(tmp_path, name)
    mine = [datasets.CIFARFS(str(root), mode) for mode in MODES]
    assert [part.classes for part in mine] == [["c2", "c3"], ["c1"], ["c0"]]
    assert sorted(os.listdir(root)) == sorted(["cifarfs", name])
    for part, mode in zip(mine, MODES, strict=True):  # learn2learn copies what it finds
        same_samples(part, oracle.datasets.CIFARFS(str(root), mode))
        same_samples(datasets.CIFARFS(str(root), mode), part)


def test_cifarfs_lists_that_do_not_fit(tmp_path):
    root = cifar100(tmp_path)
    datasets.CIFARFS(str(root))
    lists = root / "cifarfs" / "cifar100" / "splits" / "bertinetto"
    for name in ("../splits", "none"):
        (lists / "val.txt").write_text(f"c1\n{name}\n")
        with pytest.raises(
            ValueError, match=rf"val.txt: expected names of folders in .*, got '{name}'"
        ):
            datasets.CIFARFS(str(root), "validation")
    (lists / "test.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"test.txt: expected the list of the split's classes"
    ):
        datasets.CIFARFS(str(root), "test")


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("mode", MODES)
def test_mini_imagenet(tmp_path, mode, protocol):
    root = images.mini_imagenet(tmp_path, classes=(3, 2, 2), images=3, edge=10, protocol=protocol)
    mine, yours = datasets.MiniImagenet(root, mode), oracle.datasets.MiniImagenet(root, mode)
    same_samples(mine, yours)
    assert mine.class_idx == yours.class_idx
    assert mine._bookkeeping_path == yours._bookkeeping_path
    shifted = datasets.MiniImagenet(root, mode, lambda x: x / 2, lambda y: y + 5)
    assert torch.equal(shifted[1][0], mine[1][0] / 2)
    assert data.MetaDataset(shifted).labels == [y + 5 for y in data.MetaDataset(mine).labels]


def test_mini_imagenet_from_folders_is_resized(tmp_path):
    path = tmp_path / "mini-imagenet" / "val" / "n01" / "a.png"
    images.write_image(path, edge=100)
    dataset = datasets.MiniImagenet(str(tmp_path), "validation")
    x, y = dataset[0]
    assert torch.equal(x, pixels(resized(read_image(path, "RGB"), 84)).float())
    assert (x.shape, x.max() > 1, y, len(dataset)) == ((3, 84, 84), True, 0, 1)
    from PIL import Image

    Image.new("RGB", (90, 100)).save(path)
    with pytest.raises(ValueError, match=r"a.png: expected a square image, got \(84, 93\)"):
        dataset[0]


def test_pickles_that_do_not_fit(tmp_path):
    import pickle

    path = tmp_path / "mini-imagenet-cache-train.pkl"
    x = np.zeros((2, 4, 4, 3), np.uint8)
    for message, value in [
        ("expected a dictionary with image_data and class_dict", {"image_data": x}),
        ("expected a dictionary with image_data and class_dict", [x]),
        (
            r"expected image_data \[N, H, W, 3\] in uint8, got \(2, 4, 4, 3\), float32",
            {"image_data": x.astype(np.float32), "class_dict": {}},
        ),
        (r"image_data .*, got \(\), list", {"image_data": [], "class_dict": {}}),
        ("expected a dictionary class_dict, got list", {"image_data": x, "class_dict": []}),
        ("indices of its 2 images", {"image_data": x, "class_dict": {"a": [0, 2]}}),
        ("indices of its 2 images", {"image_data": x, "class_dict": {"a": [0, -1]}}),
        ("one class per image, got two", {"image_data": x, "class_dict": {"a": [0], "b": [0, 1]}}),
        ("a class for every image", {"image_data": x, "class_dict": {"a": [0]}}),
    ]:
        path.write_bytes(pickle.dumps(value))
        with pytest.raises(ValueError, match=f"cache-train.pkl: .*{message}"):
            datasets.MiniImagenet(str(tmp_path))
    whole = pickle.dumps({"image_data": x, "class_dict": {"a": [0, 1]}})
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"cache-train.pkl: expected a whole pickle file"):
        datasets.MiniImagenet(str(tmp_path))


def test_a_hostile_pickle_creates_nothing(tmp_path):
    target = tmp_path / "created"
    path = tmp_path / "mini-imagenet-cache-train.pkl"
    path.write_bytes(f"cposix\nsystem\n(S'touch {target}'\ntR.".encode())
    with pytest.raises(UnsafePickleError, match=r"cache-train.pkl: refused.* posix.system"):
        fastkfo.vision.benchmarks.get_tasksets("mini-imagenet", root=str(tmp_path))
    assert not target.exists()


@pytest.mark.parametrize("name", ["cifarfs", "mini-imagenet", "omniglot"])
def test_missing_data_say_what_to_put_where(tmp_path, name):
    root = tmp_path / "none"
    offline = mock.patch("urllib.request.urlopen", side_effect=OSError("no network"))
    with offline, pytest.raises(FileNotFoundError) as caught:
        fastkfo.vision.benchmarks.get_tasksets(name, root=str(root))
    message = str(caught.value)
    wanted = {
        "cifarfs": [root / "cifarfs.zip", root / "cifarfs" / "processed" / "train",
                    "https://zenodo.org/record/7978538/files/cifar100.zip", "not downloaded"],
        "mini-imagenet": [root / "mini-imagenet-cache-train.pkl", "not downloaded",
                          "https://zenodo.org/record/7978538/files/mini-imagenet-cache-train.pkl"],
        "omniglot": [root / "omniglot-py" / "images_background.zip", "no network",
                     "/brendenlake/omniglot/master/python/images_background.zip"],
    }[name]  # fmt: skip
    for part in wanted:
        assert str(part) in message
    left = [path for path in root.rglob("*") if path.is_file()] if root.exists() else []
    assert left == []
    assert isinstance(caught.value.__cause__, OSError) == (name == "omniglot")


def test_what_is_not_there_is_not_downloaded_unless_asked_for(tmp_path):
    unused = mock.patch("urllib.request.urlopen", side_effect=AssertionError)
    with unused, pytest.raises(FileNotFoundError, match="or pass download=True"):
        datasets.FullOmniglot(str(tmp_path))
    with pytest.raises(
        ValueError, match="mode: expected one of train, validation, test, got 'all'"
    ):
        datasets.CIFARFS(str(tmp_path), "all")
    with pytest.raises(ValueError, match="mode: expected one of"):
        datasets.MiniImagenet(str(tmp_path), "val")


def test_broken_images(tmp_path):
    root = images.cifarfs(tmp_path, classes=(1, 1, 1), images=2)
    path = Path(datasets.CIFARFS(root).samples[0][0])
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"000.png: expected a whole image, got"):
            datasets.CIFARFS(root)[0]
    path.unlink()
    (path.parent / "001.png").unlink()
    with pytest.raises(FileNotFoundError, match="class00: expected images"):
        datasets.CIFARFS(root)
    gone = mock.patch.dict(sys.modules, {"PIL": None, "PIL.Image": None})
    with gone, pytest.raises(ModuleNotFoundError, match=r"isolation '\.\[vision\]'"):
        read_image(path, "L")
    with pytest.raises(
        TypeError, match="image: expected a Pillow image of 8 bits per channel, got str"
    ):
        to_tensor("image")


@pytest.mark.parametrize("part", ["images_background", "images_evaluation"])
def test_half_of_omniglot(tmp_path, part):
    folder = Path(images.omniglot(tmp_path)) / "omniglot-py" / part
    for alphabet in folder.iterdir():
        shutil.rmtree(alphabet)
    with pytest.raises(FileNotFoundError, match=f"{part}: expected <alphabet>/<character>, got"):
        datasets.FullOmniglot(str(tmp_path))


FOLDERS = (
    ("cifar-fs", datasets.CIFARFS),
    ("cifarfs/processed", datasets.CIFARFS),
    ("mini-imagenet", datasets.MiniImagenet),
    ("omniglot", lambda root, mode: full_omniglot.given_split(root)[mode]),
)


@pytest.mark.parametrize(("place", "dataset"), FOLDERS, ids=[place for place, _ in FOLDERS])
def test_a_class_in_two_splits(tmp_path, place, dataset):
    for mode, short in zip(MODES, ("train", "val", "test"), strict=True):
        images.write_image(tmp_path / place / short / mode / "0.png")
        (tmp_path / place / short / ".cache").mkdir()  # no class
    assert [len(dataset(str(tmp_path), mode)) for mode in MODES] == [1, 1, 1]
    images.write_image(tmp_path / place / "test" / "validation" / "1.png")
    for mode in MODES:
        with pytest.raises(ValueError, match="one split, got 'validation' in validation and test"):
            dataset(str(tmp_path), mode)


def test_a_class_in_two_lists(tmp_path):
    root = cifar100(tmp_path)
    datasets.CIFARFS(str(root))
    lists = root / "cifarfs" / "cifar100" / "splits" / "bertinetto"
    (lists / "test.txt").write_text("c0\nc2\n")
    with pytest.raises(ValueError, match="one split, got 'c2' in train and test"):
        datasets.CIFARFS(str(root), "validation")


def test_layouts_are_not_mixed(tmp_path):
    """What one layout lacks is not taken from another."""
    images.cifarfs(tmp_path, classes=(2, 1, 1), images=1)
    shutil.rmtree(tmp_path / "cifarfs" / "processed" / "val")
    images.mini_imagenet(tmp_path, classes=(2, 1, 1), images=1)
    (tmp_path / "mini-imagenet-cache-validation.pkl").unlink()
    for name in ("cifar-fs", "mini-imagenet"):
        images.write_image(tmp_path / name / "validation" / "class00" / "0.png")
    for dataset in (datasets.CIFARFS, datasets.MiniImagenet):
        assert len(dataset(str(tmp_path), "train")) == 2
        with pytest.raises(FileNotFoundError, match=r"expected validation beside .*train.* mixed"):
            dataset(str(tmp_path), "validation")
    images.write_image(tmp_path / "omniglot" / "train" / "a" / "0.png", 1)
    with pytest.raises(FileNotFoundError, match="omniglot: expected validation beside"):
        full_omniglot.given_split(tmp_path)
