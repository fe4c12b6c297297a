"""As much of torchvision as learn2learn's CIFAR-FS, Omniglot and mini-ImageNet need.

Written from its documentation: it is no dependency. Names that are imported but not used are None.
"""

import os
import sys
import types
from unittest import mock

import numpy as np
import torch
from PIL import Image


class ToTensor:
    def __call__(self, image):
        array = np.asarray(image)
        array = array[:, :, None] if array.ndim == 2 else array
        return torch.tensor(array.transpose(2, 0, 1)).to(torch.get_default_dtype()) / 255


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, x):
        for transform in self.transforms:
            x = transform(x)
        return x


class Resize:
    def __init__(self, size, interpolation):
        self.size, self.interpolation = size, interpolation

    def __call__(self, image):
        assert image.width == image.height
        return image.resize((self.size, self.size), self.interpolation)


class RandomRotation:
    """By one given multiple of 90 degrees."""

    def __init__(self, degrees):
        self.turns = int(degrees[0]) // 90

    def __call__(self, x):
        return torch.tensor(np.rot90(x.numpy(), self.turns, (-2, -1)).copy())


class ImageFolder(torch.utils.data.Dataset):
    def __init__(self, root, transform=None, target_transform=None):
        self.transform = transform
        self.classes = sorted(os.listdir(root))
        self.samples = [
            (os.path.join(root, name, file), label)
            for label, name in enumerate(self.classes)
            for file in sorted(os.listdir(os.path.join(root, name)))
        ]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        path, label = self.samples[i]
        image = Image.open(path).convert("RGB")
        return (image if self.transform is None else self.transform(image)), label


class Omniglot(torch.utils.data.Dataset):
    def __init__(self, root, background, download, target_transform=None):
        folder = os.path.join(
            root, "omniglot-py", f"images_{'background' if background else 'evaluation'}"
        )
        # torchvision takes the order of the file system.
        self._characters = [
            os.path.join(folder, alphabet, character)
            for alphabet in sorted(os.listdir(folder))
            for character in sorted(os.listdir(os.path.join(folder, alphabet)))
        ]
        self.samples = [
            (os.path.join(character, file), label)
            for label, character in enumerate(self._characters)
            for file in sorted(os.listdir(character))
        ]
        self.target_transform = target_transform

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        path, label = self.samples[i]
        label = label if self.target_transform is None else self.target_transform(label)
        return Image.open(path).convert("L"), label


def installed():
    """Let `import torchvision` find this one, within the context."""
    made = {name: types.ModuleType(name) for name in (
        "torchvision", "torchvision.transforms", "torchvision.datasets",
        "torchvision.datasets.omniglot", "torchvision.datasets.folder",
    )}  # fmt: skip
    top, transforms, datasets, omniglot, folder = made.values()
    top.__version__, top.transforms, top.datasets = "0.20.0", transforms, datasets
    vars(transforms).update(
        {c.__name__: c for c in (ToTensor, Compose, Resize, RandomRotation)}
        | dict.fromkeys(
            ["ToPILImage", "RandomCrop", "RandomHorizontalFlip", "ColorJitter", "Normalize"]
        )
    )
    datasets.ImageFolder, omniglot.Omniglot, folder.default_loader = ImageFolder, Omniglot, None
    return mock.patch.dict(sys.modules, made)
