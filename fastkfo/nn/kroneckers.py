"""Modules whose linear maps are Kronecker products: KroneckerLinear, -RNN, -LSTM, -Network.

Shapes: an input is a matrix X `[..., n, m]`, or the vector vec(X) `[n * m]` of its columns.

Source: Arnold, Iqbal, Sha, "When MAML Can Adapt Fast and How to Assist When It Cannot",
AISTATS 2021; Jose, Cisse, Fleuret, "Kronecker Recurrent Units", ICML 2018; the interface is
learn2learn 0.2.0's (https://github.com/learnables/learn2learn).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "KroneckerLSTM",
    "KroneckerLinear",
    "KroneckerNetwork",
    "KroneckerRNN",
    "kronecker_addmm",
]


def kronecker_addmm(
    mat1: Tensor,
    mat2: Tensor,
    mat3: Tensor,
    bias: Tensor | None = None,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
) -> Tensor:
    """Compute alpha mat1 @ mat3 @ mat2 + beta bias.

    With vec() stacking columns, this is alpha (mat2ᵀ ⊗ mat1) vec(mat3) + beta vec(bias).

    Args:
        mat1: Left factor, `[..., n, n]`.
        mat2: Right factor, `[..., m, m]`.
        mat3: Input, `[..., n, m]`.
        bias: What to add, broadcast to the result; None for nothing.
        alpha: Scale of the product.
        beta: Scale of the bias.

    Returns:
        A tensor `[..., n, m]`.
    """
    result = mat1 @ mat3 @ mat2
    # A tensor of value 1 may want a gradient, and reading it would synchronise.
    if isinstance(alpha, Tensor) or alpha != 1:
        result = result * alpha
    if bias is None:
        return result
    if isinstance(beta, Tensor):
        return result + beta * bias
    return torch.add(result, bias, alpha=beta)


def _size(value: Any, name: str) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None
    if size < 0:
        raise ValueError(f"{name}: expected a size of at least 0, got {size}")
    return size


def _callable_or(value: Any, name: str, default: Callable[[], nn.Module]) -> Callable[..., Any]:
    if value is None:
        return default()
    if isinstance(value, type) or not callable(value):
        hint = f"the class {value.__name__}; pass an instance" if isinstance(value, type) else value
        raise TypeError(f"{name}: expected a callable on tensors, got {hint}")
    result: Callable[..., Any] = value
    return result


class KroneckerLinear(nn.Module):
    """Linear map of n x m matrices by two small factors: Y = L X R + B.

    With `psd`, L and R are replaced by LᵀL and RᵀR. On vec(X), the stacked columns, it is the
    n m x n m matrix Rᵀ ⊗ L, held in n² + m² numbers. At initialisation (identity factors, zero
    bias) the output equals the input bit for bit.

    Args:
        n: Rows of the input.
        m: Columns of the input.
        bias: Whether to add a learned matrix B.
        psd: Whether to use LᵀL and RᵀR, so that the map is positive semi-definite.
        device: Where the parameters are made. If given, inputs from other devices are taken to
            the parameters' device and the result back.
        dtype: Floating dtype of the parameters (default: PyTorch's default dtype).

    Attributes:
        left: L, `[n, n]`.
        right: R, `[m, m]`.
        bias: B, `[n, m]`, or None.

    Raises:
        TypeError: If `n` or `m` is no int.
        ValueError: If `n` or `m` is negative.

    Source: Jose et al. 2018; Arnold et al. 2021; learn2learn 0.2.0, `nn.KroneckerLinear`.
    """

    def __init__(
        self,
        n: int,
        m: int,
        bias: bool = True,
        psd: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        n, m = _size(n, "n"), _size(m, "m")
        self.left = nn.Parameter(torch.eye(n, device=device, dtype=dtype))
        self.right = nn.Parameter(torch.eye(m, device=device, dtype=dtype))
        self.bias: Tensor | None
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.zeros(n, m, device=device, dtype=dtype))
        self.psd = psd
        self.device = device

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map.

        Args:
            x: `[..., n, m]`, or `[n * m]` in column-major order; any strides, dtype of the
                parameters (under autocast: any).

        Returns:
            A tensor of the shape of `x`, on its device.

        Raises:
            TypeError: If `x` is no tensor or has another dtype than the parameters.
            ValueError: If `x` has another shape.
        """
        left: Tensor = self.left
        right: Tensor = self.right
        n, m = left.size(0), right.size(0)
        self._check(x, n, m)
        old_device = x.device
        if self.device is not None:
            # Not `self.device`: it is stale once the module was moved.
            x = x.to(left.device)
        if self.psd:
            left = left.t() @ left
            right = right.t() @ right
        if x.dim() == 1:
            y = kronecker_addmm(left, right, x.reshape(m, n).t(), self.bias).t().flatten()
        else:
            y = kronecker_addmm(left, right, x, self.bias)
        return y if self.device is None else y.to(old_device)

    def _check(self, x: Tensor, n: int, m: int) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
        shape = x.shape
        if shape[-2:] != (n, m) and shape != (n * m,):
            raise ValueError(
                f"x: expected shape (..., n, m) = (..., {n}, {m}) or (n * m,) = ({n * m},), "
                f"got {tuple(shape)}"
            )
        if x.dtype != self.left.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x: expected dtype {self.left.dtype}, got {x.dtype}")

    def extra_repr(self) -> str:
        """Describe the sizes and options."""
        n, m = self.left.size(0), self.right.size(0)
        return f"n={n}, m={m}, bias={self.bias is not None}, psd={self.psd}"


class KroneckerRNN(nn.Module):
    """Recurrent cell with Kronecker-factored maps: h' = σ(W_h x + U_h h), y = W_y h'.

    Args:
        n: Rows of input and state.
        m: Columns of input and state.
        bias: Whether each map has a bias.
        sigma: The activation σ; None for `nn.Tanh()`.
        device: Where the parameters are made.
        dtype: Floating dtype of the parameters.

    Raises:
        TypeError: If `n` or `m` is no int, or `sigma` no callable.
        ValueError: If `n` or `m` is negative.

    Source: Jose et al. 2018; learn2learn 0.2.0, `nn.KroneckerRNN`.
    """

    def __init__(
        self,
        n: int,
        m: int,
        bias: bool = True,
        sigma: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.W_h, self.U_h, self.W_y = (
            KroneckerLinear(n, m, bias, device=device, dtype=dtype) for _ in range(3)
        )
        self.sigma = _callable_or(sigma, "sigma", nn.Tanh)

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step in time.

        Args:
            x: Input, `[..., n, m]` or `[n * m]`.
            hidden: State h, of the shape of `x`.

        Returns:
            The output y and the new state h', both of the shape of `x`.
        """
        new_hidden = self.sigma(self.W_h(x) + self.U_h(hidden))
        return self.W_y(new_hidden), new_hidden


class KroneckerLSTM(nn.Module):
    """Long short-term memory cell with Kronecker-factored maps.

    i = σ(W_ii x + W_hi h), f = σ(W_if x + W_hf h), g = tanh(W_ig x + W_hg h),
    o = σ(W_io x + W_ho h); c' = f c + i g, h' = o tanh(c').

    Args:
        n: Rows of input and state.
        m: Columns of input and state.
        bias: Whether each map has a bias.
        sigma: The gates' activation σ; None for `nn.Sigmoid()`.
        device: Where the parameters are made.
        dtype: Floating dtype of the parameters.

    Raises:
        TypeError: If `n` or `m` is no int, or `sigma` no callable.
        ValueError: If `n` or `m` is negative.

    Source: Jose et al. 2018; learn2learn 0.2.0, `nn.KroneckerLSTM`.
    """

    def __init__(
        self,
        n: int,
        m: int,
        bias: bool = True,
        sigma: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        maps = (KroneckerLinear(n, m, bias, device=device, dtype=dtype) for _ in range(8))
        self.W_ii, self.W_hi, self.W_if, self.W_hf = (next(maps) for _ in range(4))
        self.W_ig, self.W_hg, self.W_io, self.W_ho = (next(maps) for _ in range(4))
        self.sigma = _callable_or(sigma, "sigma", nn.Sigmoid)
        self.tanh = nn.Tanh()

    def forward(
        self, x: Tensor, hidden: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Take one step in time.

        Args:
            x: Input, `[..., n, m]` or `[n * m]`.
            hidden: The pair (h, c), each of the shape of `x`.

        Returns:
            The output h' and the new pair (h', c'), each of the shape of `x`.
        """
        h, c = hidden
        i = self.sigma(self.W_ii(x) + self.W_hi(h))
        f = self.sigma(self.W_if(x) + self.W_hf(h))
        g = self.tanh(self.W_ig(x) + self.W_hg(h))
        o = self.sigma(self.W_io(x) + self.W_ho(h))
        c = f * c + i * g
        h = o * self.tanh(c)
        return h, (h, c)


def _slope_at_zero(activation: Callable[[Tensor], Tensor]) -> float:
    """Return f'(0); raise unless f is elementwise with f(0) = 0 and a usable slope there."""
    if isinstance(activation, nn.Module):
        # Its own copy: in float64 on the CPU, and without dropout.
        activation = copy.deepcopy(activation).to("cpu", torch.float64).eval()
    h = 1e-4
    with torch.no_grad():
        probe = torch.tensor([-h, 0.0, h], dtype=torch.float64, device="cpu")
        values = activation(probe)
    if not isinstance(values, Tensor) or values.shape != probe.shape:
        raise ValueError(f"activation: expected an elementwise function, got {activation}")
    below, at, above = values.tolist()
    if not abs(at) <= 1e-8:
        raise ValueError(
            f"activation: expected f(0) = 0, got f(0) = {at:.3g}: a zero gradient would make an "
            "update at initialisation"
        )
    slope = (above - below) / (2 * h)
    if not 1e-6 <= abs(slope) <= 1e6:
        raise ValueError(
            f"activation: expected a finite, non-zero slope at 0, got {slope:.3g}: the update at "
            "initialisation could not be scaled to the gradient"
        )
    if abs(above + below) > 0.01 * h * abs(slope):
        raise ValueError(
            f"activation: expected one slope at 0, got {0.0 - below / h:.3g} on the left and "
            f"{above / h:.3g} on the right: the update at initialisation could not be close to "
            "the gradient"
        )
    return slope


class KroneckerNetwork(nn.Module):
    """Non-linear Kronecker transform: KroneckerLinear layers with an activation between them.

    K_H ∘ f ∘ K_{H-1} ∘ … ∘ f ∘ K_0 on n x m matrices, for H hidden layers, every K_i a
    KroneckerLinear(n, m). The map starts close to the identity, so that the first update of a
    meta-optimizer is close to the gradient: with a small ε and s = f'(0), K_0 is ε I, the layers
    between are I / s and K_H is I / (ε s), hence x ↦ f(ε x) / (ε s) ≈ x for H = 1. For tanh the
    relative error is at most H (ε x)² / 3.

    Args:
        n: Rows of the input.
        m: Columns of the input.
        hidden_layers: H, at least 0 (0 is a KroneckerLinear).
        activation: f, elementwise, with f(0) = 0 and one finite, non-zero slope at 0 (positive
            with `psd`); None for `nn.Tanh()`.
        bias: Whether each layer has a bias.
        psd: Whether each layer uses LᵀL and RᵀR.
        device: Where the parameters are made.
        dtype: Floating dtype of the parameters.

    Attributes:
        layers: The H + 1 KroneckerLinear layers.
        activation: The activation f.

    Raises:
        TypeError: If a size is no int, or `activation` no callable.
        ValueError: If a size is negative, or `activation` has no usable slope at zero.

    Source: Arnold et al. 2021, who use two hidden layers and whose code for it is not public;
    this initialisation is our own.
    """

    #: ε: the part of the activation, around zero, that a gradient of 1 uses at the start.
    init_scale = 1e-2

    def __init__(
        self,
        n: int,
        m: int,
        hidden_layers: int = 2,
        activation: Callable[[Tensor], Tensor] | None = None,
        bias: bool = True,
        psd: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = _size(hidden_layers, "hidden_layers")
        layers = [KroneckerLinear(n, m, bias, psd, device, dtype) for _ in range(hidden + 1)]
        self.layers = nn.ModuleList(layers)
        self.activation = _callable_or(activation, "activation", nn.Tanh)
        if hidden:
            self._scale_layers(layers, _slope_at_zero(self.activation))

    def _scale_layers(self, layers: list[KroneckerLinear], slope: float) -> None:
        scales = [1 / slope] * len(layers)
        scales[0] = self.init_scale
        scales[-1] /= self.init_scale
        for layer, scale in zip(layers, scales, strict=True):
            if layer.psd and scale < 0:
                raise ValueError(
                    f"activation: expected a positive slope at 0 with psd=True, got {slope:.3g}"
                )
            # Shared evenly between the factors; LᵀL and RᵀR square them.
            factor = abs(scale) ** (0.25 if layer.psd else 0.5)
            with torch.no_grad():
                layer.left.mul_(factor)
                layer.right.mul_(factor if scale > 0 else -factor)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map.

        Args:
            x: `[..., n, m]`, or `[n * m]` in column-major order; dtype of the parameters.

        Returns:
            A tensor of the shape of `x`.

        Raises:
            TypeError: If `x` is no tensor or has another dtype than the parameters.
            ValueError: If `x` has another shape.
        """
        first, *others = self.layers
        x = first(x)
        for layer in others:
            x = layer(self.activation(x))
        return x
