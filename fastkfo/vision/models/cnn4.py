"""The small networks: blocks, their initialisers, Omniglot's two networks and CNN4.

Source: the interface is learn2learn 0.2.0's `vision.models.cnn4`
(https://github.com/learnables/learn2learn).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fastkfo.functional.checks import finite
from fastkfo.nn import Flatten, Lambda
from fastkfo.vision.models.checks import fitting, identity, positive

__all__ = [
    "CNN4",
    "CNN4Backbone",
    "ConvBase",
    "ConvBlock",
    "LinearBlock",
    "MiniImagenetCNN",
    "OmniglotCNN",
    "OmniglotFC",
    "fc_init_",
    "maml_init_",
    "truncated_normal_",
]

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)


@torch.no_grad()
def truncated_normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Fill with mean + std z, z standard normal but within ±2; in place.

    Formula: z = Φ⁻¹(Φ(−2) + u (Φ(2) − Φ(−2))), u uniform in [0, 1). As in learn2learn, u comes from
    numpy's global generator, one draw per element: `numpy.random.seed` decides, not
    `torch.manual_seed`. The values are scipy's `truncnorm.rvs(-2, 2)` to about 1e-15.

    Args:
        tensor: Any shape, floating.
        mean: The mean.
        std: The standard deviation before the truncation.

    Returns:
        The tensor itself.

    Raises:
        TypeError: If `tensor` is no floating-point tensor.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"tensor: expected a floating-point tensor, got {got}")
    u = np.random.uniform(size=tuple(tensor.shape))  # noqa: NPY002 (learn2learn's generator)
    below = torch.special.ndtr(torch.tensor(-2.0, dtype=torch.float64, device="cpu"))
    z = torch.special.ndtri(below + torch.as_tensor(u, device="cpu") * (1 - 2 * below))
    return tensor.copy_(mean + std * z)


def fc_init_(module: _ModuleT) -> _ModuleT:
    """Draw the weight from `truncated_normal_` with std = 0.01, set the bias to zero; in place.

    Args:
        module: A layer. A weight or bias that it does not have is left out.

    Returns:
        The module itself.
    """
    if isinstance(weight := getattr(module, "weight", None), Tensor):
        truncated_normal_(weight.data, mean=0.0, std=0.01)
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        nn.init.zeros_(bias.data)
    return module


def maml_init_(module: _ModuleT) -> _ModuleT:
    """Draw the weight by Xavier's uniform rule, set the bias to zero; in place.

    Args:
        module: A layer with a weight of at least two axes, with or without a bias.

    Returns:
        The module itself.

    Raises:
        TypeError: If `module` has no weight.
    """
    if not isinstance(weight := getattr(module, "weight", None), Tensor):
        raise TypeError(f"module: expected a layer with a weight, got {type(module).__name__}")
    nn.init.xavier_uniform_(weight.data)
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        nn.init.zeros_(bias.data)
    return module


class LinearBlock(nn.Module):
    """Linear layer, batch normalisation (always by the batch's statistics), ReLU.

    Args:
        input_size: Length D of an input.
        output_size: Length P of an output.

    Raises:
        TypeError: If a size is no int.
        ValueError: If a size is below 1.
    """

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        positive("input_size", input_size)
        positive("output_size", output_size)
        self.relu = nn.ReLU()
        self.normalize = nn.BatchNorm1d(
            output_size, eps=1e-3, momentum=0.999, track_running_stats=False
        )
        self.linear = fc_init_(nn.Linear(input_size, output_size))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, D]` to `[B, P]`."""
        return self.relu(self.normalize(self.linear(x)))


class ConvBlock(nn.Module):
    """Convolution with padding 1, batch normalisation, ReLU, and pooling or a stride.

    Args:
        in_channels: Channels C of the input.
        out_channels: Channels P of the output.
        kernel_size: Of the convolution.
        max_pool: Whether max-pooling makes the output smaller; else the convolution's stride does.
        max_pool_factor: f; windows and strides are int(2 f).

    Raises:
        TypeError: If a number of channels is no int, or `max_pool_factor` no number.
        ValueError: If a number of channels is below 1, or int(2 f) is.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        max_pool: bool = True,
        max_pool_factor: float = 1.0,
    ) -> None:
        super().__init__()
        positive("in_channels", in_channels)
        positive("out_channels", out_channels)
        finite("max_pool_factor", max_pool_factor)
        stride = int(2 * max_pool_factor)
        if stride < 1:
            raise ValueError(f"max_pool_factor: expected at least 0.5, got {max_pool_factor}")
        # A plain function where nothing pools: then no submodule of that name, as in learn2learn.
        self.max_pool: Callable[[Tensor], Tensor] = identity
        if max_pool:
            self.max_pool = nn.MaxPool2d(kernel_size=(stride, stride), stride=(stride, stride))
            stride = 1
        self.normalize = nn.BatchNorm2d(out_channels)
        nn.init.uniform_(self.normalize.weight)
        self.relu = nn.ReLU()
        self.conv = maml_init_(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride=(stride, stride), padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to `[B, P, H', W']`."""
        return self.max_pool(self.relu(self.normalize(self.conv(x))))


class ConvBase(nn.Sequential):
    """A chain of `ConvBlock`s with 3 × 3 kernels: `[B, C, H, W]` to `[B, hidden, H', W']`.

    Args:
        hidden: Channels of every output.
        channels: Channels C of the images.
        max_pool: See `ConvBlock`.
        layers: Number of blocks.
        max_pool_factor: See `ConvBlock`.
        output_size: Ignored. Older releases of learn2learn took it, and their scripts pass it.

    Raises:
        TypeError: If a size is no int, or `max_pool_factor` no number.
        ValueError: If a size is below 1, or the blocks' strides would be.
    """

    def __init__(
        self,
        hidden: int = 64,
        channels: int = 1,
        max_pool: bool = False,
        layers: int = 4,
        max_pool_factor: float = 1.0,
        *,
        output_size: int | None = None,
    ) -> None:
        for name, size in (("hidden", hidden), ("channels", channels), ("layers", layers)):
            positive(name, size)
        inputs = [channels] + [hidden] * (layers - 1)
        super().__init__(*[ConvBlock(c, hidden, (3, 3), max_pool, max_pool_factor) for c in inputs])

    def __getitem__(self, idx: slice | int) -> nn.Sequential | nn.Module:
        if isinstance(idx, slice):  # torch would call this class with the blocks
            return nn.Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)


class OmniglotFC(nn.Module):
    """Fully connected network for Omniglot.

    Args:
        input_size: D, the elements of one image.
        output_size: Number of outputs O.
        sizes: Widths of the hidden layers; None for 256, 128, 64, 64.

    Attributes:
        features: `[B, ...]` to `[B, sizes[-1]]`.
        classifier: The linear head.
        input_size: Length D of an input.

    Raises:
        TypeError: If `sizes` is no sequence, or a size no int.
        ValueError: If `sizes` is empty, or a size below 1.

    Source: Santoro et al., "Meta-Learning with Memory-Augmented Neural Networks", ICML 2016.
    """

    def __init__(
        self, input_size: int, output_size: int, sizes: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        sizes = [256, 128, 64, 64] if sizes is None else sizes
        if not isinstance(sizes, Sequence):
            raise TypeError(f"sizes: expected a sequence of ints, got {type(sizes).__name__}")
        if not sizes:
            raise ValueError(f"sizes: expected at least one hidden layer, got {sizes!r}")
        positive("input_size", input_size)
        positive("output_size", output_size)
        for i, size in enumerate(sizes):
            positive(f"sizes[{i}]", size)
        widths = [input_size, *sizes]
        layers = [LinearBlock(d, p) for d, p in zip(widths[:-1], sizes, strict=True)]
        self.features = nn.Sequential(Flatten(), nn.Sequential(*layers))
        self.classifier = fc_init_(nn.Linear(sizes[-1], output_size))
        self.input_size = input_size

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, ...]`, D elements each, to `[B, O]`."""
        out: Tensor = self.classifier(self.features(x))
        return out


def as_omniglot(x: Tensor) -> Tensor:
    """View as images of Omniglot.

    Args:
        x: `[..., 784]`, `[..., 28, 28]` or `[..., 28, 28, 1]`.

    Returns:
        `[B, 1, 28, 28]`, with all other dimensions in B.

    Raises:
        ValueError: If `x` has another shape, one that would be cut up without a word.
    """
    shape = tuple(x.shape)
    if shape[-1:] != (784,) and shape[-2:] != (28, 28) and shape[-3:] != (28, 28, 1):
        raise ValueError(f"x: expected shape [B, 1, 28, 28] or [B, 784], got {shape}")
    return x.reshape(-1, 1, 28, 28)


def spatial_mean(x: Tensor) -> Tensor:
    """Average `[B, C, H, W]` over H and W: `[B, C]`."""
    return x.mean(dim=[2, 3])


class OmniglotCNN(nn.Module):
    """Convolutional network for Omniglot: strides, no pooling, a mean over space, a linear head.

    Args:
        output_size: Number of outputs O.
        hidden_size: Channels of the hidden layers.
        layers: Number of blocks.

    Attributes:
        base: The blocks; they are part of `features` too, so the state dict holds them twice, and
            `torch.func.functional_call` needs `tie_weights=False` (else it leaves the model
            changed: https://github.com/pytorch/pytorch/issues/164759).
        features: `[B, 1, 28, 28]` to `[B, hidden_size]`.
        classifier: The linear head.
        hidden_size: As given.

    Raises:
        TypeError: If a size is no int.
        ValueError: If a size is below 1.

    Source: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
    Networks", ICML 2017, arXiv 1703.03400.
    """

    def __init__(self, output_size: int = 5, hidden_size: int = 64, layers: int = 4) -> None:
        super().__init__()
        positive("output_size", output_size)
        positive("hidden_size", hidden_size)
        self.hidden_size = hidden_size
        self.base = ConvBase(hidden_size, channels=1, max_pool=False, layers=layers)
        self.features = nn.Sequential(
            Lambda(as_omniglot), self.base, Lambda(spatial_mean), Flatten()
        )
        self.classifier = nn.Linear(hidden_size, output_size)
        nn.init.normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, 1, 28, 28]`, or what `as_omniglot` takes, to `[B, O]`."""
        out: Tensor = self.classifier(self.features(x))
        return out


class CNN4Backbone(ConvBase):
    """The blocks of `CNN4`, flattened: `[B, C, H, W]` to `[B, hidden_size H' W']`.

    Args:
        hidden_size: Channels of the hidden layers.
        layers: Number of blocks.
        channels: Channels C of the images.
        max_pool: See `ConvBlock`.
        max_pool_factor: See `ConvBlock`; None for 4 // layers.

    Raises:
        TypeError: If a size is no int, or `max_pool_factor` no number.
        ValueError: If a size is below 1, the blocks' strides would be, or `layers` is above 4 and
            no `max_pool_factor` given.

    Source: Ravi, Larochelle, "Optimization as a Model for Few-Shot Learning", ICLR 2017.
    """

    def __init__(
        self,
        hidden_size: int = 64,
        layers: int = 4,
        channels: int = 3,
        max_pool: bool = True,
        max_pool_factor: float | None = None,
    ) -> None:
        positive("hidden_size", hidden_size)
        positive("layers", layers)
        if max_pool_factor is None:
            if layers > 4:
                raise ValueError(
                    "layers: expected at most 4 without a max_pool_factor, which would be "
                    f"4 // layers, got {layers}"
                )
            max_pool_factor = 4 // layers
        super().__init__(hidden_size, channels, max_pool, layers, max_pool_factor)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to `[B, P]`."""
        return super().forward(x).flatten(1)


class CNN4(nn.Module):
    """Convolutional network for mini-ImageNet; also under the name `MiniImagenetCNN`.

    Args:
        output_size: Number of outputs O.
        hidden_size: Channels of the hidden layers.
        layers: Number of blocks, 1 to 4.
        channels: Channels C of the images.
        max_pool: See `ConvBlock`.
        embedding_size: P, the features of one image; None for 25 · hidden_size, which fits
            84 × 84 images, `max_pool` and 4 or 2 layers.

    Attributes:
        features: A `CNN4Backbone`.
        classifier: The linear head.
        hidden_size: As given.

    Raises:
        TypeError: If a size is no int.
        ValueError: If a size is below 1, or `layers` above 4.

    Source: Ravi, Larochelle, "Optimization as a Model for Few-Shot Learning", ICLR 2017.
    """

    def __init__(
        self,
        output_size: int,
        hidden_size: int = 64,
        layers: int = 4,
        channels: int = 3,
        max_pool: bool = True,
        embedding_size: int | None = None,
    ) -> None:
        super().__init__()
        positive("output_size", output_size)
        self.features = CNN4Backbone(hidden_size, layers, channels, max_pool)
        embedding_size = 25 * hidden_size if embedding_size is None else embedding_size
        positive("embedding_size", embedding_size)
        self.classifier = maml_init_(nn.Linear(embedding_size, output_size))
        self.hidden_size = hidden_size

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: `[B, C, H, W]`.

        Returns:
            `[B, O]`.

        Raises:
            ValueError: If images of this size have not P features.
        """
        out: Tensor = self.classifier(fitting("embedding_size", self.features(x), self.classifier))
        return out


MiniImagenetCNN = CNN4
