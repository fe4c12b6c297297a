"""Rotations of classes, and augmentation of tensors."""

import functools
import random

import numpy as np
import pytest
import torch

from fastkfo import data
from fastkfo.vision import augmentation
from fastkfo.vision.transforms import RandomClassRotation, rotated
from tests.data_oracle import learn2learn_vision

oracle = learn2learn_vision()


def planes(x):
    return x.reshape(-1, *x.shape[-2:])


@pytest.mark.parametrize("shape", [(3, 6, 6), (5, 5), (2, 3, 4, 6), (1, 4, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
def test_rotations(shape, dtype):
    x = torch.randint(1, 200, shape).to(dtype)
    from PIL import Image

    for degrees in (0, 90.0, 180, 270, -90, 450, 33, 200.5):
        y = rotated(x, degrees)
        assert y.shape == x.shape
        assert y.dtype == dtype
        if degrees % 180 == 0 or (degrees % 90 == 0 and shape[-1] == shape[-2]):
            assert torch.equal(y, torch.rot90(x, int(degrees // 90), (-2, -1)))
        elif dtype == torch.uint8 and degrees % 90:  # Pillow's nearest pixel
            for plane, turned in zip(planes(x), planes(y), strict=True):
                image = np.asarray(Image.fromarray(plane.numpy()).rotate(degrees))
                np.testing.assert_array_equal(turned.numpy(), image)


class Labelled(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.arange(9.0).view(1, 3, 3) + i, i % 4


def test_each_class_has_its_rotation():
    """The draws are learn2learn's; there, the last one is applied to all classes."""
    dataset = data.MetaDataset(Labelled())
    found = []
    for kind in (RandomClassRotation, oracle.transforms.RandomClassRotation):
        load = data.transforms.LoadData(dataset)
        description = load(load.new_task())
        random.seed(4)
        description = kind(dataset, [0, 90, 180, 270])(description)
        found.append(
            [functools.reduce(lambda x, f: f(x), d.transforms, d.index) for d in description]
        )
        after = random.random()
    random.seed(4)
    angles = [random.choice([0, 90, 180, 270]) for _ in range(4)]
    assert random.random() == after
    assert len(set(angles)) > 1
    for i, ((x, y), (other, _)) in enumerate(zip(*found, strict=True)):
        plain = dataset[i][0]
        assert y == i % 4
        assert torch.equal(x, torch.rot90(plain, angles[y] // 90, (-2, -1)))
        assert torch.equal(other, torch.rot90(plain, angles[3] // 90, (-2, -1)))


def test_rotation_errors():
    dataset = data.MetaDataset(Labelled())
    for kind, message, degrees in [
        (ValueError, "degrees: expected at least one angle, got none", []),
        (TypeError, "degrees: expected a sequence, got int", 90),
        (TypeError, r"degrees\[0\]: expected a number", ["a"]),
        (ValueError, r"degrees\[1\]: expected a finite number, got nan", [0, float("nan")]),
    ]:
        with pytest.raises(kind, match=message):
            RandomClassRotation(dataset, degrees)
    with pytest.raises(TypeError, match="image: expected a tensor or an image, got int"):
        rotated(3, 90)


def test_crops_and_flips():
    x = torch.arange(1.0, 13).view(1, 3, 4)
    crop = augmentation.RandomCrop(3, padding=1)
    seen = {tuple(crop(x).flatten().tolist()) for _ in range(200)}
    padded = torch.zeros(5, 6)
    padded[1:4, 1:5] = x[0]
    assert seen == {
        tuple(padded[i : i + 3, j : j + 3].flatten().tolist()) for i in range(3) for j in range(4)
    }
    flipped = {tuple(augmentation.RandomHorizontalFlip()(x)[0, 0].tolist()) for _ in range(50)}
    assert flipped == {(1, 2, 3, 4), (4, 3, 2, 1)}
    assert torch.equal(augmentation.RandomHorizontalFlip(1)(x), x.flip(-1))
    with pytest.raises(ValueError, match=r"edges of at least 4, got \(1, 3, 4\)"):
        augmentation.RandomCrop(6, padding=1)(x)


def test_colours():
    """Each alone, by the formula, with the factor that the seed gives."""
    x = torch.rand(3, 5, 5)
    grey = 0.2989 * x[0] + 0.587 * x[1] + 0.114 * x[2]
    for name, reference in (("brightness", 0.0), ("contrast", grey.mean()), ("saturation", grey)):
        torch.manual_seed(2)
        y = augmentation.ColorJitter(**{name: 0.4})(x)
        torch.manual_seed(2)
        torch.randperm(3)
        factor = 0.6 + 0.8 * float(torch.rand(()))
        torch.testing.assert_close(y, (factor * x + (1 - factor) * reference).clamp(0, 1))
        assert not torch.equal(x, y)
    assert augmentation.ColorJitter()(x) is x
    mean, std = [0.1, 0.2, 0.3], [1.0, 2.0, 4.0]
    normal = augmentation.Compose([augmentation.Normalize(mean, std), lambda z: z * 2])(x)
    for c in range(3):
        torch.testing.assert_close(normal[c], 2 * (x[c] - mean[c]) / std[c])
