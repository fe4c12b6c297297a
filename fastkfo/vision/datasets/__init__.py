"""Data sets of few-shot vision, read from where torchvision and learn2learn leave them."""

from fastkfo.vision.datasets.cifarfs import CIFARFS
from fastkfo.vision.datasets.full_omniglot import FullOmniglot
from fastkfo.vision.datasets.mini_imagenet import MiniImagenet

__all__ = ["CIFARFS", "FullOmniglot", "MiniImagenet"]
