"""Labelled images from data sets and folders."""

import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from fastkfo.tasks import FewShotTasks, read_dataset, read_folder
from fastkfo.vision.images import read_image

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called


class Items(Dataset):
    def __init__(self, items):
        self.items, self.reads = items, 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.reads += 1
        return self.items[index]


def test_tensors():
    images, labels = torch.rand(6, 3, 2, 2), torch.tensor([5, 1, 5, 1, 1, 5])
    found = read_dataset(TensorDataset(images, labels))
    assert torch.equal(found.images, images)
    assert torch.equal(found.labels, labels)
    assert found.names == ()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pil_images(mode):
    array = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(array[..., 0] if mode == "L" else array)
    found = read_dataset([(image, 0)]).images
    expected = torch.from_numpy(array).permute(2, 0, 1)
    assert found.dtype == torch.uint8
    assert torch.equal(found[0], expected[:1] if mode == "L" else expected)


def test_tasks_from_a_dataset_read_it_once():
    dataset = Items([(np.full((1, 2, 2), i, dtype=np.float32), np.int64(i % 3)) for i in range(12)])
    tasks = FewShotTasks.from_dataset(dataset, 2, 1, 3, classes=[0, 2], seed=4)
    assert dataset.reads == 12
    x_s, y_s, x_q, y_q = tasks.sample(5)
    assert x_q.shape == (5, 6, 1, 2, 2)
    for x, y in ((x_s, y_s), (x_q, y_q)):
        numbers = x[..., 0, 0, 0].long() % 3
        assert set(numbers.flatten().tolist()) == {0, 2}
        assert ((y == y[:, :1]) == (numbers == numbers[:, :1])).all()
    assert dataset.reads == 12


ONE = torch.zeros(1, 2, 2)


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (iter([(ONE, 0)]), TypeError, "dataset: expected one with a length"),
        ([], ValueError, "dataset: expected at least one sample"),
        ([(ONE, 0), (torch.zeros(1, 2, 3), 0)], ValueError, r"dataset\[1\]: .* shape \[1, 2, 2\]"),
        ([(ONE, 0), (ONE.double(), 0)], ValueError, r"dataset\[1\]: .*float32.* got .*float64"),
        ([(ONE, 0), ONE], TypeError, r"dataset\[1\]: expected \(image, label\), got Tensor"),
        ([(ONE, 0, 1)], TypeError, r"dataset\[0\]: expected \(image, label\), got tuple"),
        ([(ONE, 0.5)], TypeError, r"dataset\[0\]: expected an integer label, got float"),
        ([(ONE, torch.tensor(0.5))], TypeError, r"dataset\[0\]: expected an integer label"),
        ([(ONE, True)], TypeError, r"dataset\[0\]: expected an integer label, got bool"),
        ([("a", 0)], TypeError, r"dataset\[0\]: expected an image, got str"),
    ],
)
def test_bad_datasets(dataset, error, message):
    with pytest.raises(error, match=message):
        read_dataset(dataset)


@pytest.fixture
def folder(tmp_path):
    """Two grey images of 3 x 4 in each of three classes, all pixels the same number."""
    for c, name in enumerate(("b", "a", "c")):
        (tmp_path / name).mkdir()
        for i, suffix in enumerate(("png", "BMP")):
            array = np.full((3, 4), 100 * c + i, dtype=np.uint8)
            Image.fromarray(array).save(tmp_path / name / f"{i}.{suffix}")
        (tmp_path / name / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "file.png").write_text("no folder")
    return tmp_path


def test_folders_are_classes(folder):
    images, labels, names = read_folder(folder, channels=1)
    assert names == ("a", "b", "c")
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.shape == (6, 1, 3, 4)
    assert images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [100, 101, 0, 1, 200, 201]


def test_sizes_and_channels(folder):
    Image.fromarray(np.full((9, 9), 7, dtype=np.uint8)).save(folder / "b" / "9.jpg")
    assert read_folder(folder, size=(5, 2)).images.shape == (7, 3, 5, 2)
    assert read_folder(str(folder), size=6, channels=1).images.shape == (7, 1, 6, 6)
    with pytest.raises(ValueError, match=r"size: expected one to resize to.*\(3, 4\), .*9.jpg"):
        read_folder(folder)


def test_rows_are_height_and_columns_width(tmp_path):
    (tmp_path / "a").mkdir()
    array = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    Image.fromarray(array).save(tmp_path / "a" / "x.png")
    assert torch.equal(read_folder(tmp_path).images[0], torch.from_numpy(array).permute(2, 0, 1))


def test_tasks_from_a_folder(folder):
    tasks = FewShotTasks.from_folder(folder, 2, 1, 1, classes=("c", "b"), channels=1, seed=1)
    x_s, _, x_q, _ = tasks.sample(20)
    assert x_s.dtype == torch.float32
    values = (torch.cat([x_s, x_q]) * 255).round().unique().tolist()
    assert values == [0, 1, 200, 201]


def test_messages_name_the_folder(folder):
    with pytest.raises(ValueError, match="the images of class 'a', got"):
        FewShotTasks.from_folder(folder, 2, 1, 2)


def test_bad_folders(folder):
    with pytest.raises(ValueError, match=r"path: expected a folder, got .*nowhere"):
        read_folder(folder / "nowhere")
    with pytest.raises(ValueError, match=r"path: expected images .* in .*nowhere, got none"):
        read_folder(folder, classes=["a", "nowhere"])
    with pytest.raises(ValueError, match="classes: expected distinct folders"):
        read_folder(folder, classes=["a", "a"])
    with pytest.raises(ValueError, match=r"classes: expected distinct folders .* got \[\]"):
        read_folder(folder / "a")
    with pytest.raises(ValueError, match="channels: expected 1 or 3, got 4"):
        read_folder(folder, channels=4)
    with pytest.raises(TypeError, match="size: expected an int, got float"):
        read_folder(folder, size=2.0)
    with pytest.raises(ValueError, match="size: expected a height and a width"):
        read_folder(folder, size=(1, 2, 3))
    (folder / "a" / "broken.png").write_text("no image")
    with pytest.raises(ValueError, match=r"broken.png: expected a whole image"):
        read_folder(folder)


def header(edge):
    """The beginning of a grey PNG file, so many pixels high and wide."""
    content = b"IHDR" + struct.pack(">IIBBBBB", edge, edge, 8, 0, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(content))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + content + checksum + bytes(4) + b"IDAT"


def test_images_far_too_large(folder):
    (folder / "a" / "bomb.png").write_bytes(header(60_000))
    with pytest.raises(ValueError, match=r"bomb.png: expected a whole image, got .*Bomb"):
        read_folder(folder)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits(folder, dtype):
    """They would all be white."""
    kind = "PNG" if dtype == np.uint16 else "TIFF"
    Image.fromarray(np.full((3, 4), 1000, dtype)).save(folder / "a" / "deep.png", kind)
    with pytest.raises(ValueError, match=r"deep.png: expected an image of 8 bits per channel, got"):
        read_folder(folder)
    with pytest.raises(ValueError, match=r"deep.png: expected an image of 8 bits per channel, got"):
        read_image(folder / "a" / "deep.png", "RGB")


def test_without_pillow(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match="reading images needs Pillow"):
        read_folder(folder)
