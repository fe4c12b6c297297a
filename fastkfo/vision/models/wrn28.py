"""Wide residual networks.

Source: Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016, arXiv 1605.07146; the interface
is learn2learn 0.2.0's `vision.models.wrn28` (https://github.com/learnables/learn2learn).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastkfo.vision.models.checks import fitting, positive, rate

__all__ = ["WRN28", "WRN28Backbone", "WideResNet", "wide_basic"]

POOL = 21  # window and stride of the average pooling


def conv3x3(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """Make a 3 × 3 convolution with padding 1 and a bias."""
    return nn.Conv2d(in_planes, out_planes, 3, stride=stride, padding=1)


class wide_basic(nn.Module):
    """Two 3 × 3 convolutions, each after batch normalisation and ReLU, and a shortcut.

    Args:
        in_planes: Channels C of the input.
        planes: Channels P of the output.
        dropout_rate: Rate of the dropout between the convolutions.
        stride: Stride s of the second convolution and of the shortcut.

    Raises:
        TypeError: If a size is no int, or the rate no number.
        ValueError: If a size is below 1, or the rate not in [0, 1].
    """

    def __init__(self, in_planes: int, planes: int, dropout_rate: float, stride: int = 1) -> None:
        super().__init__()
        for name, size in (("in_planes", in_planes), ("planes", planes), ("stride", stride)):
            positive(name, size)
        rate("dropout_rate", dropout_rate)
        self.bn1, self.conv1 = nn.BatchNorm2d(in_planes), conv3x3(in_planes, planes)
        self.dropout = nn.Dropout(p=dropout_rate)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), conv3x3(planes, planes, stride)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut.append(nn.Conv2d(in_planes, planes, kernel_size=1, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to `[B, P, H / s, W / s]`."""
        out = self.dropout(self.conv1(F.relu(self.bn1(x))))
        out = self.conv2(F.relu(self.bn2(out)))
        return out + self.shortcut(x)


class WideResNet(nn.Module):
    """Features of RGB images: `[B, 3, H, W]` to `[B, P]`.

    Args:
        depth: Number of convolutions, 6 n + 4 with n of at least 1.
        widen_factor: k; layers have 16 k, 32 k, 64 k channels.
        dropout_rate: Rate of the dropout within the blocks.

    Attributes:
        in_planes: 64 k.

    Raises:
        TypeError: If a size is no int, or the rate no number.
        ValueError: If `depth` is none of 10, 16, ..., `widen_factor` is below 1, or the rate not in
            [0, 1].

    Source: Zagoruyko and Komodakis 2016.
    """

    def __init__(self, depth: int, widen_factor: int, dropout_rate: float) -> None:
        super().__init__()
        positive("depth", depth)
        positive("widen_factor", widen_factor)
        rate("dropout_rate", dropout_rate)
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth: expected 6 n + 4 with n >= 1, got {depth}")
        self.in_planes = 16
        planes = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = conv3x3(3, 16)
        self.layer1 = self._wide_layer(planes[0], blocks, dropout_rate, stride=1)
        self.layer2 = self._wide_layer(planes[1], blocks, dropout_rate, stride=2)
        self.layer3 = self._wide_layer(planes[2], blocks, dropout_rate, stride=2)
        self.bn1 = nn.BatchNorm2d(planes[2], momentum=0.9)

    def _wide_layer(self, planes: int, blocks: int, dropout: float, stride: int) -> nn.Sequential:
        """Make the blocks of a layer; the first has the stride."""
        layer = nn.Sequential()
        for i in range(blocks):
            layer.append(wide_basic(self.in_planes, planes, dropout, 1 if i else stride))
            self.in_planes = planes
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features.

        Args:
            x: `[B, 3, H, W]`.

        Returns:
            `[B, P]`, P = 64 k for images up to 164 × 164.

        Raises:
            ValueError: If the images are too small for the average pooling.
        """
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        if min(out.shape[2:]) < POOL:
            raise ValueError(f"x: expected images of at least 81 x 81, got shape {tuple(x.shape)}")
        return F.avg_pool2d(F.relu(self.bn1(out)), POOL).flatten(1)


class WRN28Backbone(WideResNet):
    """The features of `WRN28`: `[B, 3, H, W]` to `[B, P]`, P = 640 for 84 × 84 images.

    Args:
        dropout: Rate of the dropout within the blocks.

    Raises:
        TypeError: If `dropout` is no number.
        ValueError: If it is not in [0, 1].

    Source: Dhillon, Chaudhari, Ravichandran, Soatto, "A Baseline for Few-Shot Image
    Classification", ICLR 2020, arXiv 1909.02729.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        rate("dropout", dropout)
        super().__init__(depth=28, widen_factor=10, dropout_rate=dropout)


class WRN28(nn.Module):
    """Wide residual network of 28 layers, ten times as wide, and a linear head.

    Args:
        output_size: Number of outputs O.
        hidden_size: P, the features of one image.
        dropout: Rate of the dropout within the blocks.

    Attributes:
        features: A `WRN28Backbone`.
        classifier: The linear head.

    Raises:
        TypeError: If a size is no int, or `dropout` no number.
        ValueError: If a size is below 1, or `dropout` not in [0, 1].

    Source: Dhillon, Chaudhari, Ravichandran, Soatto, "A Baseline for Few-Shot Image
    Classification", ICLR 2020, arXiv 1909.02729.
    """

    def __init__(self, output_size: int, hidden_size: int = 640, dropout: float = 0.0) -> None:
        super().__init__()
        positive("output_size", output_size)
        positive("hidden_size", hidden_size)
        self.features = WRN28Backbone(dropout)
        self.classifier = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: `[B, 3, H, W]`.

        Returns:
            `[B, O]`.

        Raises:
            ValueError: If images of this size have not P features, or are below 81 × 81.
        """
        out: Tensor = self.classifier(fitting("hidden_size", self.features(x), self.classifier))
        return out
