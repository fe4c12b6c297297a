"""ResNet-12 with DropBlock.

Source: Lee, Maji, Ravichandran, Soatto, "Meta-Learning with Differentiable Convex Optimization",
CVPR 2019, arXiv 1904.03758; the interface is learn2learn 0.2.0's `vision.models.resnet12`
(https://github.com/learnables/learn2learn).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkfo.nn import Flatten, Lambda
from fastkfo.vision.models.checks import fitting, identity, positive, rate

__all__ = ["BasicBlock", "DropBlock", "ResNet12", "ResNet12Backbone"]

POOL = 5  # the window of the average pooling
RAMP = 40000  # passes until DropBlock drops at its full rate


def conv3x3(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """Make a 3 × 3 convolution with padding 1 and no bias."""
    return nn.Conv2d(in_planes, out_planes, 3, stride=stride, padding=1, bias=False)


class DropBlock(nn.Module):
    """Sets squares of a feature map to zero and scales the rest up, in training only.

    Corners of squares are drawn with probability γ, per image and channel, on the CPU whatever the
    device. Kept from learn2learn: its `n` corners and the `b²` cells of a square are paired by
    counting both round `n b²` times, so if gcd(n, b²) > 1 only some cells of each square are
    dropped, besides its middle.

    Args:
        block_size: Width b of a square.

    Raises:
        TypeError: If `block_size` is no int.
        ValueError: If it is below 1.

    Source: Ghiasi, Lin, Le, "DropBlock: A regularization method for convolutional networks",
    NeurIPS 2018.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__()
        positive("block_size", block_size)
        self.block_size = block_size

    def forward(self, x: Tensor, gamma: float) -> Tensor:
        """Drop.

        Args:
            x: `[B, C, H, W]`.
            gamma: γ.

        Returns:
            `[B, C, H, W]`: `M x · |M| / ΣM` for the mask M in training, x itself otherwise. If M is
            all zero, so is the result (learn2learn's is NaN).

        Raises:
            TypeError: In training, if `gamma` is no number.
            ValueError: In training, if `gamma` is not in [0, 1], or a square larger than the map.
        """
        if not self.training:
            return x
        rate("gamma", gamma)
        shape = [*x.shape[:2], *(size - self.block_size + 1 for size in x.shape[2:])]
        if min(shape[2:]) < 1:
            raise ValueError(
                f"block_size: expected at most {min(x.shape[2:])} for a feature map of "
                f"{tuple(x.shape[2:])}, got {self.block_size}"
            )
        corners = torch.bernoulli(torch.tensor(gamma).expand(shape)).to(x.device)
        mask = self._compute_block_mask(corners)
        return (mask * x * (mask.numel() / mask.sum().clamp(min=1))).to(x.dtype)

    def _compute_block_mask(self, mask: Tensor) -> Tensor:
        """Map drawn corners `[B, C, H - b + 1, W - b + 1]` to what is kept, `[B, C, H, W]`."""
        size, area = self.block_size, self.block_size**2
        before, after = (size - 1) // 2, size // 2
        dropped = F.pad(mask, (before, after, before, after))
        corners = mask.nonzero()
        cell = torch.arange(area, device=mask.device).repeat(len(corners))
        image, channel, row, column = corners.repeat(area, 1).unbind(1)
        dropped[image, channel, row + cell // size, column + cell % size] = 1.0
        return 1 - dropped


class BasicBlock(nn.Module):
    """Three 3 × 3 convolutions with batch normalisation, a shortcut, max-pooling, and dropping.

    Args:
        inplanes: Channels C of the input.
        planes: Channels P of the output.
        stride: Window and stride s of the max-pooling.
        downsample: The shortcut, `[B, C, H, W]` to `[B, P, H, W]`; None for the identity.
        drop_rate: Rate p of the dropping.
        drop_block: Whether squares are dropped instead of single activations. Their rate is
            min(p t / 40000, p) on the block's t-th pass.
        block_size: Width of a square.

    Attributes:
        num_batches_tracked: t, an int. As in learn2learn it also counts passes in evaluation, is
            not in the state dict, and a clone counts on its own.

    Raises:
        TypeError: If a size is no int, or the rate no number.
        ValueError: If a size is below 1, or the rate not in [0, 1].
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        drop_rate: float = 0.0,
        drop_block: bool = False,
        block_size: int = 1,
    ) -> None:
        super().__init__()
        for name, size in (("inplanes", inplanes), ("planes", planes), ("stride", stride)):
            positive(name, size)
        rate("drop_rate", drop_rate)
        self.conv1, self.bn1 = conv3x3(inplanes, planes), nn.BatchNorm2d(planes)
        self.relu = nn.LeakyReLU(0.1)
        self.conv2, self.bn2 = conv3x3(planes, planes), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv3x3(planes, planes), nn.BatchNorm2d(planes)
        self.maxpool = nn.MaxPool2d(stride)
        self.downsample = downsample
        self.stride = stride
        self.drop_rate = drop_rate
        self.num_batches_tracked = 0
        self.drop_block = drop_block
        self.block_size = block_size
        self.DropBlock = DropBlock(block_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to `[B, P, H / s, W / s]`."""
        self.num_batches_tracked += 1
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self._drop(self.maxpool(self.relu(out + shortcut)))

    def _drop(self, x: Tensor) -> Tensor:
        if self.drop_rate <= 0:
            return x
        if self.drop_block:
            out: Tensor = self.DropBlock(x, gamma=self._gamma(x.size(2)))
            return out
        # In place: a GPU draws other numbers for a dropout that is not.
        return F.dropout(x, p=self.drop_rate, training=self.training, inplace=True)

    def _gamma(self, size: int) -> float:
        """Compute γ = (1 - keep) / b² · H² / (H - b + 1)² for maps of H = `size` rows."""
        keep = max(1.0 - self.drop_rate / RAMP * self.num_batches_tracked, 1.0 - self.drop_rate)
        places = max(size - self.block_size + 1, 1)  # below 1, DropBlock says what is wrong
        return min((1 - keep) / self.block_size**2 * size**2 / places**2, 1.0)


class ResNet12Backbone(nn.Module):
    """The features of `ResNet12`: `[B, C, H, W]` to `[B, P]`.

    Args:
        avg_pool: Whether 5 × 5 windows of the last map are averaged.
        wider: Whether layers have 64, 160, 320, 640 channels; else 64, 128, 256, 512.
        embedding_dropout: Rate of the dropout of the features.
        dropblock_dropout: Rate of the dropping within the blocks: activations in the first two,
            squares in the last two, see `BasicBlock`.
        dropblock_size: Width of a square.
        channels: Channels C of the images.

    Attributes:
        inplanes: Channels of the last map.
        keep_avg_pool: `avg_pool`.
        embedding_dropout: As given.
        dropblock_dropout: As given.

    Raises:
        TypeError: If a size is no int, or a rate no number.
        ValueError: If a size is below 1, or a rate not in [0, 1].

    Source: Lee et al. 2019; the narrower one is of Oreshkin, Rodríguez López, Lacoste, "TADAM",
    NeurIPS 2018.
    """

    def __init__(
        self,
        avg_pool: bool = True,
        wider: bool = True,
        embedding_dropout: float = 0.0,
        dropblock_dropout: float = 0.1,
        dropblock_size: int = 5,
        channels: int = 3,
    ) -> None:
        super().__init__()
        positive("channels", channels)
        positive("dropblock_size", dropblock_size)
        rate("embedding_dropout", embedding_dropout)
        rate("dropblock_dropout", dropblock_dropout)
        self.inplanes = channels
        self.dropblock_dropout = dropblock_dropout
        planes = [64, 160, 320, 640] if wider else [64, 128, 256, 512]
        self.layer1 = self._make_layer(planes[0])
        self.layer2 = self._make_layer(planes[1])
        self.layer3 = self._make_layer(planes[2], dropblock_size)
        self.layer4 = self._make_layer(planes[3], dropblock_size)
        self.avgpool = nn.AvgPool2d(POOL, stride=1) if avg_pool else Lambda(identity)
        self.flatten = Flatten()
        self.embedding_dropout = embedding_dropout
        self.keep_avg_pool = avg_pool
        self.dropout = nn.Dropout(p=embedding_dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")

    def _make_layer(self, planes: int, block_size: int | None = None) -> nn.Sequential:
        """Make a layer that halves the map; its dropping is of squares if they have a size."""
        shortcut = nn.Sequential(
            nn.Conv2d(self.inplanes, planes, kernel_size=1, bias=False), nn.BatchNorm2d(planes)
        )
        block = BasicBlock(
            self.inplanes,
            planes,
            stride=2,
            downsample=shortcut,
            drop_rate=self.dropblock_dropout,
            drop_block=block_size is not None,
            block_size=block_size or 1,
        )
        self.inplanes = planes
        return nn.Sequential(block)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features.

        Args:
            x: `[B, C, H, W]`.

        Returns:
            `[B, P]`.

        Raises:
            ValueError: If the images are too small for the average pooling, or, in training, for
                the squares to drop.
        """
        out = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        if self.keep_avg_pool and min(out.shape[2:]) < POOL:
            raise ValueError(
                "x: expected images of at least 80 x 80 with avg_pool=True, "
                f"got shape {tuple(x.shape)}"
            )
        features: Tensor = self.dropout(self.flatten(self.avgpool(out)))
        return features


class ResNet12(nn.Module):
    """Residual network of 12 layers with DropBlock, and a linear head.

    Args:
        output_size: Number of outputs O.
        hidden_size: P, the features of one image: 640 (`wider`) or 512 for 84 × 84 images with
            `avg_pool`, 25 times as many without.
        avg_pool: See `ResNet12Backbone`, as for all that follow.
        wider: Width of the layers.
        embedding_dropout: Rate of the dropout of the features.
        dropblock_dropout: Rate of the dropping within the blocks.
        dropblock_size: Width of a square.
        channels: Channels C of the images.

    Attributes:
        features: A `ResNet12Backbone`.
        classifier: The linear head.

    Raises:
        TypeError: If a size is no int, or a rate no number.
        ValueError: If a size is below 1, or a rate not in [0, 1].

    Source: Lee, Maji, Ravichandran, Soatto, "Meta-Learning with Differentiable Convex
    Optimization", CVPR 2019, arXiv 1904.03758.
    """

    def __init__(
        self,
        output_size: int,
        hidden_size: int = 640,
        avg_pool: bool = True,
        wider: bool = True,
        embedding_dropout: float = 0.0,
        dropblock_dropout: float = 0.1,
        dropblock_size: int = 5,
        channels: int = 3,
    ) -> None:
        super().__init__()
        positive("output_size", output_size)
        positive("hidden_size", hidden_size)
        self.features = ResNet12Backbone(
            avg_pool, wider, embedding_dropout, dropblock_dropout, dropblock_size, channels
        )
        self.classifier = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: `[B, C, H, W]`.

        Returns:
            `[B, O]`.

        Raises:
            ValueError: If images of this size have not P features, or see `ResNet12Backbone`.
        """
        out: Tensor = self.classifier(fitting("hidden_size", self.features(x), self.classifier))
        return out
