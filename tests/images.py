"""Tiny files in the formats of Omniglot, CIFAR-FS and mini-ImageNet."""

import pickle

import numpy as np
from PIL import Image


def write_image(path, channels=3, edge=32, seed=0, level=None):
    """A random image; `level`, of 16, makes those of a class alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (edge, edge, 3)[: 2 if channels == 1 else 3]
    image = np.random.default_rng(seed).integers(0, 256, shape)
    if level is not None:
        image = image // 4 + level * 12
    Image.fromarray(image.astype(np.uint8)).save(path)


def cifarfs(root, classes=(6, 5, 5), images=12):
    """learn2learn's processed CIFAR-FS."""
    label = 0
    for part, count in zip(("train", "val", "test"), classes, strict=True):
        for _ in range(count):
            for i in range(images):
                folder = root / "cifarfs" / "processed" / part / f"class{label:02d}"
                write_image(folder / f"{i:03d}.png", seed=100 * label + i, level=label)
            label += 1
    return str(root)


def omniglot(root, alphabets=(("Latin", 5), ("Greek", 4), ("Tifinagh", 3)), images=4):
    """torchvision's Omniglot; the last alphabet is the evaluation set."""
    seed = 0
    for name, characters in alphabets:
        part = "images_evaluation" if name == alphabets[-1][0] else "images_background"
        for c in range(characters):
            for i in range(images):
                seed += 1
                path = (
                    root / "omniglot-py" / part / name / f"character{c:02d}" / f"{seed:04d}_{i}.png"
                )
                write_image(path, channels=1, edge=30, seed=seed)
    return str(root)


def mini_imagenet(root, classes=(6, 5, 5), images=12, edge=84, protocol=4):
    """learn2learn's pickles."""
    root.mkdir(parents=True, exist_ok=True)
    for part, count in zip(("train", "validation", "test"), classes, strict=True):
        data = np.random.default_rng(count).integers(0, 256, (count * images, edge, edge, 3))
        data = {
            "image_data": data.astype(np.uint8),
            "class_dict": {
                f"n{part}{c}": list(range(c, count * images, count)) for c in range(count)
            },
        }
        (root / f"mini-imagenet-cache-{part}.pkl").write_bytes(pickle.dumps(data, protocol))
    return str(root)
