"""Data sets by name: the tasks to train, validate and test on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastkfo.tasks import (
    DigitTasks,
    FewShotTasks,
    SinusoidTasks,
    TaskDistribution,
    read_folder,
    split_classes,
)
from fastkfo.tasks.loading import Labelled
from fastkfo.training.config import TrainConfig

__all__ = ["DATASETS", "SPLITS", "Problem", "load", "settled"]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Problem:
    """What is learned from.

    Attributes:
        tasks: A distribution per split that was asked for.
        shape: Of one input.
        outputs: Of the network.
        regression: Whether targets are numbers; else labels.
        device: Where the tasks are.
    """

    tasks: dict[str, TaskDistribution]
    shape: tuple[int, ...]
    outputs: int
    regression: bool
    device: str


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        text: What it is, for people.
        backbone: What ``auto`` stands for.
        make: Makes one split's tasks.
        fast_lr: The inner learning rate, if none is given.
    """

    text: str
    backbone: str
    make: Callable[[TrainConfig, str], TaskDistribution]
    fast_lr: float = 0.1


def load(config: TrainConfig, splits: Iterable[str] = SPLITS) -> Problem:
    """Reads a data set; images stay uint8 and lie on the device, where tasks are drawn.

    Args:
        config: Its ``dataset`` is a name, or a folder.
        splits: Which of ``SPLITS``.

    Returns:
        The tasks. Each split has a seed of its own, made of the config's.

    Raises:
        ModuleNotFoundError: If what reads the data is not installed.
        ValueError: If the name is unknown, files are missing or damaged, the device is not there,
            or classes or images are too few.
    """
    source, device = source_of(config), _device(config.device)
    config = config.changed(device=str(device))
    tasks = {split: source.make(config, split) for split in splits}
    first = next(iter(tasks.values()))
    # A state of its own for a look at the shapes: the first draw stays the first.
    state = first.state_dict()
    look = first.sample(1)
    first.load_state_dict(state)
    regression = look.y_s.is_floating_point()
    outputs = look.y_s.shape[-1] if regression else config.ways
    return Problem(tasks, tuple(look.x_s.shape[2:]), outputs, regression, config.device)


def source_of(config: TrainConfig) -> Source:
    """The data set that a config names.

    Returns:
        The data set.

    Raises:
        ValueError: If it is neither a known name nor a folder.
    """
    if config.dataset in DATASETS:
        return DATASETS[config.dataset]
    if Path(config.dataset).expanduser().is_dir():
        return Source("a folder", "pool-4x32", _folder)
    raise ValueError(
        f"dataset: expected one of {', '.join(DATASETS)}, or a folder with {', '.join(SPLITS)} in "
        f"it, got {config.dataset!r}"
    )


def settled(config: TrainConfig) -> TrainConfig:
    """A config with what its defaults stand for, by its data set and method.

    Returns:
        The config; ``backbone``, ``fast_lr`` and ``adapt_transform`` are neither auto nor None.
    """
    source = source_of(config)
    # A non-linear transform that is adapted diverges easily: docs/training.md.
    linear_kfo = config.method.endswith("-kfo") and config.hidden_kfo_layers == 0
    adapt = linear_kfo if config.adapt_transform is None else config.adapt_transform
    return config.changed(
        adapt_transform=adapt,
        backbone=source.backbone if config.backbone == "auto" else config.backbone,
        fast_lr=source.fast_lr if config.fast_lr is None else config.fast_lr,
    )


def seed_of(config: TrainConfig, split: str) -> int:
    """A split's seed: the three never share a stream, whatever the config's seed is."""
    return 3 * config.seed + SPLITS.index(split)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected cpu, since PyTorch sees no GPU, got {name!r}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected one of the {torch.cuda.device_count()} GPUs, got {name!r}"
        )
    return device


def _digits(config: TrainConfig, split: str) -> TaskDistribution:
    return DigitTasks(
        "valid" if split == "validation" else split,
        config.ways,
        config.shots,
        config.queries,
        seed=seed_of(config, split),
        dtype=getattr(torch, config.dtype),
        device=config.device,
    )


def _sinusoid(config: TrainConfig, split: str) -> TaskDistribution:
    return SinusoidTasks(
        config.shots,
        config.queries,
        seed=seed_of(config, split),
        dtype=getattr(torch, config.dtype),
        device=config.device,
    )


def _few_shot(
    config: TrainConfig,
    split: str,
    data: Labelled,
    *,
    classes: Iterable[int] | None = None,
    rotations: int = 1,
) -> TaskDistribution:
    try:
        return FewShotTasks(
            data.images,
            data.labels,
            config.ways,
            config.shots,
            config.queries,
            classes=classes,
            rotations=rotations,
            names=data.names,
            seed=seed_of(config, split),
            dtype=getattr(torch, config.dtype),
            device=config.device,
        )
    except ValueError as error:
        raise ValueError(f"{error} (in the {split} split of {config.dataset!r})") from None


def _folder(config: TrainConfig, split: str) -> TaskDistribution:
    from fastkfo.vision.datasets.image_folder import split_folders

    root = Path(config.dataset).expanduser()
    found = split_folders(root)
    missing = [name for name in SPLITS if name not in found]
    if missing:
        raise ValueError(
            f"dataset: expected the folders {', '.join(SPLITS)}, with a folder of images per class "
            f"in each, in {root}; {', '.join(missing)} not found"
        )
    return _few_shot(config, split, read_folder(found[split], size=config.image_size or None))


def _omniglot(config: TrainConfig, split: str) -> TaskDistribution:
    from fastkfo.training.vision_sources import omniglot, omniglot_split
    from fastkfo.vision.datasets.full_omniglot import split_sizes

    given = omniglot_split(config, split)
    if given is not None:
        return _few_shot(config, split, given, rotations=4)
    data = omniglot(config)
    parts = split_classes(data.labels, split_sizes(len(data.names)), seed=0)
    classes = parts[SPLITS.index(split)]
    return _few_shot(config, split, data, classes=classes, rotations=4)


def _cifar_fs(config: TrainConfig, split: str) -> TaskDistribution:
    from fastkfo.training.vision_sources import cifar_fs

    return _few_shot(config, split, cifar_fs(config, split))


def _mini_imagenet(config: TrainConfig, split: str) -> TaskDistribution:
    from fastkfo.training.vision_sources import mini_imagenet

    return _few_shot(config, split, mini_imagenet(config, split))


#: By name.
DATASETS = {
    "digits": Source("8 x 8 handwritten digits, part of scikit-learn", "plain-2x16", _digits),
    "sinusoid": Source("regression on sine waves", "mlp-40x40", _sinusoid, 0.01),
    "omniglot": Source("1623 characters, 28 x 28, at four rotations", "strided-4x64", _omniglot),
    "cifar-fs": Source("100 classes, 32 x 32", "mean-4x32", _cifar_fs),
    "mini-imagenet": Source("100 classes, 84 x 84", "pool-4x32", _mini_imagenet),
}
