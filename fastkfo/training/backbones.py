"""Networks by name: features without their head, for the shape of one input."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastkfo.nn import Flatten, Lambda
from fastkfo.vision.models import CNN4Backbone, ConvBase

__all__ = ["BACKBONES", "features"]


def _mean_of_pixels(x: Tensor) -> Tensor:
    return x.mean(dim=[2, 3])


def _mlp(shape: Sequence[int], sizes: list[int]) -> nn.Module:
    layers: list[nn.Module] = [Flatten()] if len(shape) > 1 else []
    for inputs, outputs in zip([math.prod(shape), *sizes], sizes, strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def _plain(shape: Sequence[int], sizes: list[int]) -> nn.Module:
    blocks, channels = sizes
    layers: list[nn.Module] = []
    for inputs in [shape[0]] + [channels] * (blocks - 1):
        layers += [nn.Conv2d(inputs, channels, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, Flatten())


def _strided(shape: Sequence[int], sizes: list[int]) -> nn.Module:
    blocks, channels = sizes
    base = ConvBase(channels, shape[0], max_pool=False, layers=blocks)
    return nn.Sequential(base, Lambda(_mean_of_pixels))


def _mean(shape: Sequence[int], sizes: list[int]) -> nn.Module:
    blocks, channels = sizes
    base = ConvBase(channels, shape[0], max_pool=False, layers=blocks, max_pool_factor=0.5)
    return nn.Sequential(base, Lambda(_mean_of_pixels))


def _pool(shape: Sequence[int], sizes: list[int]) -> nn.Module:
    blocks, channels = sizes
    return CNN4Backbone(channels, blocks, shape[0])


#: Kind: what makes it, and what it is.
BACKBONES: dict[str, tuple[Callable[[Sequence[int], list[int]], nn.Module], str]] = {
    "mlp": (_mlp, "linear layers and ReLU, their widths"),
    "plain": (_plain, "3 x 3 convolutions of stride 2 and ReLU"),
    "strided": (_strided, "convolutions of stride 2, batch norm, ReLU; the mean of the pixels"),
    "mean": (_mean, "convolutions of stride 1, batch norm, ReLU; the mean of the pixels"),
    "pool": (_pool, "convolutions, batch norm, ReLU, max-pooling (CNN4)"),
}


def features(name: str, shape: Sequence[int]) -> tuple[nn.Module, int]:
    """Builds a network without its head.

    Args:
        name: ``mlp-WIDTHxWIDTH...``, or ``KIND-BLOCKSxCHANNELS`` with one of the other
            ``BACKBONES``: ``mlp-40x40``, ``mean-2x32``.
        shape: Of one input: ``[D]``, or for convolutions ``[C, H, W]``.

    Returns:
        The network, which maps ``[S, *shape]`` to ``[S, P]``, and P.

    Raises:
        ValueError: If the name is none, or the network does not fit such inputs.

    Example:
        >>> network, p = features("plain-2x16", (1, 8, 8))
        >>> p
        64
    """
    kind, _, rest = name.partition("-")
    if kind not in BACKBONES or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", rest):
        kinds = ", ".join(f"{kind}-{'40x40' if kind == 'mlp' else '4x32'}" for kind in BACKBONES)
        raise ValueError(f"backbone: expected one like {kinds}, got {name!r}")
    sizes = [int(size) for size in rest.split("x")]
    if kind != "mlp" and (len(sizes) != 2 or len(shape) != 3):
        raise ValueError(
            f"backbone: expected BLOCKSxCHANNELS and images [C, H, W] for {kind}, got {name!r} and "
            f"inputs {list(shape)}"
        )
    try:
        made = BACKBONES[kind][0](shape, sizes)
        with torch.no_grad():
            size = made.eval()(torch.zeros(2, *shape, dtype=torch.get_default_dtype())).shape[1]
    except (MemoryError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        first = str(error).partition("\n")[0]  # PyTorch's go on with frames of C++
        raise ValueError(
            f"backbone: expected one for inputs {list(shape)}, got {name!r}: {first}"
        ) from None
    if size == 0:
        raise ValueError(f"backbone: nothing of inputs {list(shape)} is left after {name!r}")
    return made.train(), size
