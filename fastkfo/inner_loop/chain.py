"""Models made of linear layers and elementwise functions: T tasks without vmap.

vmap costs about as much as such a model itself. What is known exactly runs directly on
`[T, S, ...]`: a linear layer is one batched product, an elementwise function is what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastkfo.functional.linear import linear_unchecked
from fastkfo.nn import Flatten, LinNet
from fastkfo.optim.recognise import global_hooks, is_plain

Layer = Callable[[Tensor], Tensor]

_ELEMENTWISE = (
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Softplus, nn.Identity,
    nn.Dropout,
)  # fmt: skip


def chain_of(module: nn.Module) -> list[Layer] | None:
    """The layers of a model in the form for T tasks.

    Args:
        module: the model; `nn.Linear`s among it hold `[T, n, m]`.

    Returns:
        Functions of `[T, S, ...]`, to be called one after the other; None if any part of the model
        is not known.
    """
    layers: list[Layer] = []
    return layers if not global_hooks() and _append(module, layers) else None


def _append(module: nn.Module | None, layers: list[Layer]) -> bool:
    if module is None or not is_plain(module):
        return False
    kind = type(module)
    if kind in (nn.Sequential, LinNet):
        return all([_append(child, layers) for child in module._modules.values()])
    if kind is nn.Linear and {"weight", "bias"} <= module._parameters.keys():
        layers.append(_linear(module))
    elif kind in _ELEMENTWISE:
        layers.append(module)
    elif kind is Flatten or (
        isinstance(module, nn.Flatten)
        and kind is nn.Flatten
        and (module.start_dim, module.end_dim) == (1, -1)
    ):
        layers.append(_flatten)
    else:
        return False
    return True


def _flatten(x: Tensor) -> Tensor:
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


def _linear(module: Any) -> Layer:
    def linear(x: Tensor) -> Tensor:
        weight, bias = module._parameters["weight"], module._parameters["bias"]  # [T, n, m], [T, n]
        if x.shape[-1] != weight.shape[-1]:
            raise ValueError(
                f"nn.Linear: expected inputs with {weight.shape[-1]} features, "
                f"got shape {list(x.shape[1:])} per task"
            )
        return linear_unchecked(x, weight, bias)

    return linear
