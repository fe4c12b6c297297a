"""The product of adjacent linear layers, as one layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastkfo.nn.surgery import check_linear, check_plain

__all__ = ["collapse_layers", "wanted"]


def collapse_layers(layers: nn.Module | Iterable[nn.Module]) -> nn.Linear:
    """Multiply out adjacent linear layers: W = W_D … W_1, b = W_D (… (W_2 b_1 + b_2) …) + b_D.

    Products are taken in float64 and rounded once.

    Args:
        layers: `nn.Linear` and `nn.Identity`, or any nest of these in `nn.Sequential`,
            `nn.ModuleList`, lists and other iterables; from the input to the output.

    Returns:
        One layer with the dtype and device of the first; with a bias if any layer has one. Its
        weight requires gradients if any weight does, its bias if any bias does.

    Raises:
        TypeError: If something is no plain `nn.Linear`, `nn.Identity`, or nest of these.
        ValueError: If there is no linear layer, a layer does not take what comes in, or parameters
            are those of several tasks, or on the meta device.
    """
    found = list(_linear(layers))
    if not found:
        raise ValueError("layers: expected at least one nn.Linear, got none")
    for position, layer in enumerate(found):
        _check_factor(f"layers: at linear layer {position}", layer)
        width = found[max(position - 1, 0)].out_features
        if position > 0 and layer.in_features != width:
            raise ValueError(
                f"layers: expected linear layer {position} to take the {width} features that come "
                f"in, got {layer}"
            )
    weight, bias = _product(found)
    like: Tensor = found[0].weight
    shape = {"in_features": found[0].in_features, "out_features": found[-1].out_features}
    place: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    # Without a draw: nobody's random numbers depend on whether layers were multiplied out.
    result = nn.utils.skip_init(nn.Linear, **shape, bias=bias is not None, **place)
    with torch.no_grad():
        result.weight.copy_(weight)
        if bias is not None:
            result.bias.copy_(bias)
    for name, p in result.named_parameters():
        p.requires_grad_(wanted(found, name))
    return result.train(found[0].training)


def _check_factor(where: str, layer: Any) -> None:
    check_linear(where, layer)
    if layer.weight.dim() != 2:
        raise ValueError(
            f"{where}: expected a weight [n, m], got one of shape {list(layer.weight.shape)}, as a "
            "clone for several tasks has; collapse that of one task"
        )
    if layer.weight.is_meta:
        raise ValueError(f"{where}: expected parameters with values, got them on the meta device")


def wanted(layers: Iterable[nn.Linear], name: str) -> bool:
    """Whether the weight of any layer, or the bias, requires gradients."""
    found = [getattr(layer, name) for layer in layers]
    return any([p.requires_grad for p in found if p is not None])


@torch.no_grad()
def _product(layers: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    weight, bias = _exact(layers[0].weight), _exact(layers[0].bias)
    for layer in layers[1:]:
        w, b = _exact(layer.weight), _exact(layer.bias)
        weight = w @ weight
        bias = b if bias is None else w @ bias if b is None else w @ bias + b
    return weight, bias


def _exact(x: Any) -> Any:
    """In float64 (or complex128); on the CPU, since not every device has that."""
    return None if x is None else x.to("cpu", torch.promote_types(x.dtype, torch.float64))


def _linear(layers: Any) -> Iterator[Any]:
    """What a nest of sequences calls, in order, without what changes nothing."""
    if isinstance(layers, nn.Sequential):
        check_plain("layers", layers, nn.Sequential)
    if type(layers) is nn.Identity:
        check_plain("layers", layers, nn.Identity)
    elif isinstance(layers, nn.Sequential | nn.ModuleList) or (
        isinstance(layers, Iterable) and not isinstance(layers, nn.Module | Tensor | str)
    ):
        for layer in layers:
            yield from _linear(layer)
    else:
        yield layers
