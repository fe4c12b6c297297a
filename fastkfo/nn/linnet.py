"""LinNet: linear layers that are added to a model for adaptation, and multiplied out afterwards.

A product of linear layers computes what one layer can, but gradient descent moves it differently.
With W = W_2 W_1 and G the gradient of W, a step of rate α on both factors moves W by

    −α (W_2 W_2ᵀ G + G W_1ᵀ W_1) + O(α²)

where a step on W alone is −α G: the factors transform the gradient, and MAML learns them.

Shapes: a layer maps `[..., m]` to `[..., n]` by `x Wᵀ + b`, W `[n, m]`.

Source: Arnold, Iqbal, Sha, "When MAML Can Adapt Fast and How to Assist When It Cannot",
AISTATS 2021. Their code for it is not published; names, options and initialisation are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from fastkfo.nn.product import collapse_layers, wanted
from fastkfo.nn.surgery import (
    check_model,
    check_plain,
    copy_of,
    find_linear,
    put,
)

__all__ = ["LinNet", "add_linear_layers", "collapse", "collapse_layers", "split_linear"]

INITS = ("default", "identity")


class LinNet(nn.Sequential):
    """Product of linear layers: y = W_D (… (W_1 x + b_1) …) + b_D, with nothing between them.

    The inner loop takes it as the plain sequence of `nn.Linear` that it is, the fused one too.

    Args:
        depth: D, how many layers, at least 1.
        in_features: m, the length of x.
        out_features: n, the length of y; None for m.
        width: Length of what is between two layers; None for m. Below min(n, m) the product has
            that rank at most.
        bias: Whether every layer has a bias.
        init: "default": every layer as `nn.Linear` draws it, the first one first. "identity": W_1
            to W_{D-1} are identities (cut or padded with zeros where they are not square) and their
            biases zero, W_D is drawn; the map is then W_D's own wherever width is at least m.
        device: Where the parameters are made.
        dtype: Floating dtype of the parameters (default: PyTorch's default dtype).

    Raises:
        TypeError: If a size is no int.
        ValueError: If a size is below 1, or `init` is unknown.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), LinNet(3, 8, 5))
        >>> collapse(model)[2]
        Linear(in_features=8, out_features=5, bias=True)

    Source: Arnold et al. 2021.
    """

    def __init__(
        self,
        depth: int,
        in_features: int,
        out_features: int | None = None,
        *,
        width: int | None = None,
        bias: bool = True,
        init: str = "default",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_count("depth", depth)
        _check_count("in_features", in_features)
        out_features = in_features if out_features is None else out_features
        _check_count("out_features", out_features)
        width = in_features if width is None else width
        _check_count("width", width)
        _check_init(init)
        sizes = [in_features, *[width] * (depth - 1), out_features]
        layers = [nn.Linear(m, n, bias, device, dtype) for m, n in pairwise(sizes)]
        if init == "identity":
            for layer in layers[:-1]:
                _make_identity(layer)
        super().__init__(*layers)

    def __getitem__(self, idx: int | slice) -> Any:
        """Return a layer, or a plain sequence of those in a slice."""
        if isinstance(idx, slice):  # nn.Sequential would make a LinNet of them
            return nn.Sequential(*list(self)[idx])
        return super().__getitem__(idx)


def add_linear_layers(
    model: nn.Module, depth: int, name: str | None = None, *, init: str = "default"
) -> nn.Module:
    """Add linear layers before a model's output layer, which becomes a LinNet.

    The output layer W `[n, m]` stays, as the last of depth + 1: W W_depth … W_1, each W_i `[m, m]`.
    The layers added have biases if W has one. Their weights require gradients if W does, their
    biases if its bias does; those of the output layer stay as they are. What the model can express
    stays the same; `collapse` takes the layers out again.

    Where a model's code reads the layer's `weight` itself, it finds a LinNet, which has none: so
    does nn.TransformerEncoderLayer in eval mode with its `linear1` and `linear2`.

    Args:
        model: The model. It is copied, and left as it is.
        depth: How many to add, at least 1.
        name: Of the output layer, as in `named_modules`; None for the last `nn.Linear` there.
        init: Of what is added. "default": as `nn.Linear` draws them, the first one first.
            "identity": identities without bias, so that the model computes what it did.

    Returns:
        The copy. If the model is the layer itself, a LinNet.

    Raises:
        TypeError: If an argument has the wrong type, the model is or contains one that adapts
            others, or the layer is no plain `nn.Linear`.
        ValueError: If there is no such layer, it shares its weights, depth is below 1, `init` is
            unknown, or a lazy layer of the model has no parameters yet.

    Source: Arnold et al. 2021.
    """
    check_model(model)
    _check_count("depth", depth)
    _check_init(init)
    if name is not None:
        _check_name(name)
    else:
        names = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not names:
            raise ValueError("model: expected at least one nn.Linear, got none")
        name = names[-1]
    result = copy_of(model)
    layer = find_linear(result, name)
    m = layer.in_features
    made = LinNet(depth, m, bias=layer.bias is not None, **_place(layer))
    if init == "identity":
        for added in made:
            _make_identity(added)
    made.append(layer)
    return put(result, name, _like(made, layer))


def split_linear(
    model: nn.Module, name: str, depth: int, *, width: int | None = None, init: str = "identity"
) -> nn.Module:
    """Replace one linear layer of a model by a product of several, a LinNet.

    W `[n, m]` becomes W_D … W_1 with W_1 `[width, m]`, W_D `[n, width]`. Every factor has a bias if
    the layer has one. All weights require gradients if W does, all biases if its bias does.
    `collapse` multiplies them out again.

    Where a model's code reads the layer's `weight` itself, it finds a LinNet, which has none: so
    does nn.TransformerEncoderLayer in eval mode with its `linear1` and `linear2`.

    Args:
        model: The model. It is copied, and left as it is.
        name: Of the layer, as in `named_modules`; "" for a model that is a linear layer.
        depth: D, at least 1.
        width: Length of what is between two factors; None for m.
        init: "identity": the product is the layer it replaces, bit for bit. W is W_D and the others
            identities without bias, padded with zeros where they are not square; or, where width is
            below m, W is W_1. "default": all factors are drawn as `nn.Linear` draws them, the first
            one first, and W is not used.

    Returns:
        The copy. If the model is the layer itself, a LinNet.

    Raises:
        TypeError: If an argument has the wrong type, the model is or contains one that adapts
            others, or the layer is no plain `nn.Linear`.
        ValueError: If there is no such layer, it shares its weights, depth or width is below 1,
            `init` is unknown, a lazy layer of the model has no parameters yet, or with "identity"
            the width is below both n and m.

    Source: Arnold et al. 2021.
    """
    check_model(model)
    _check_name(name)
    _check_init(init)
    result = copy_of(model)
    layer = find_linear(result, name)
    n, m = layer.out_features, layer.in_features
    bias = layer.bias is not None
    made = LinNet(depth, m, n, width=width, bias=bias, init="default", **_place(layer))
    if init == "identity":
        inner = m if width is None else width
        if depth > 1 and inner < min(n, m):
            raise ValueError(
                f"width: expected at least {min(n, m)}, the smaller size of a layer from {m} to "
                f"{n} features, for init 'identity', got {inner}"
            )
        _spread(layer, list(made), first=inner < m)
    return put(result, name, _like(made, layer))


def collapse(model: nn.Module) -> nn.Module:
    """Multiply out every LinNet of a model.

    With float64 parameters the result computes what the model does up to rounding; it has the
    state-dict keys that the model had before layers were added.

    Args:
        model: The model, also one that was adapted (a learner's `module`). It is copied, detached,
            and left as it is.

    Returns:
        The copy, with an `nn.Linear` in place of every LinNet; an `nn.Linear` if the model is a
        LinNet itself.

    Raises:
        TypeError: If the model is no module, or is or contains one that adapts others; if a LinNet
            has hooks or, as a subclass, a `forward` of its own; or if something is between its
            layers that is neither `nn.Linear` nor `nn.Identity`.
        ValueError: If there is no LinNet, sizes of layers do not fit, parameters are those of
            several tasks, are on the meta device, or a lazy layer has none yet.

    Source: Arnold et al. 2021.
    """
    check_model(model)
    result = copy_of(model)
    found = {
        key: module
        for key, module in result.named_modules(remove_duplicate=False)
        if isinstance(module, LinNet)
    }
    if not found:
        raise ValueError("model: expected at least one LinNet, got none")
    for name, module in found.items():
        check_plain(f"model: at {name!r}", module, nn.Sequential)
    made = {module: collapse_layers(module) for module in found.values()}
    if result in made:
        return made[result]
    for name, module in found.items():
        # One within another went with it; one in two places is one layer in both.
        if not any([name.startswith(f"{other}.") for other in found]):
            put(result, name, made[module])
    return result


def _make_identity(layer: Any) -> None:
    with torch.no_grad():
        nn.init.eye_(layer.weight)
        if layer.bias is not None:
            layer.bias.zero_()


def _spread(layer: nn.Linear, factors: Sequence[Any], first: bool) -> None:
    """Makes the product a layer's own map: it is one factor, the others are identities."""
    for factor in factors:
        _make_identity(factor)
    holder = factors[0 if first else -1]
    with torch.no_grad():
        holder.weight.zero_()
        holder.weight[: layer.out_features, : layer.in_features] = layer.weight
        if layer.bias is not None:
            # After identities only: the last factor adds it to whatever the product is.
            factors[-1].bias.copy_(layer.bias)


def _place(layer: nn.Linear) -> dict[str, Any]:
    return {"device": layer.weight.device, "dtype": layer.weight.dtype}


def _like(made: LinNet, layer: nn.Linear) -> LinNet:
    """In the mode of the layer it replaces; weights and biases frozen if its own are."""
    for factor in made:
        for name, p in factor.named_parameters():
            p.requires_grad_(wanted([layer], name))
    return made.train(layer.training)


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__}")


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def _check_init(init: Any) -> None:
    if init not in INITS:
        raise ValueError(f"init: expected one of {', '.join(INITS)}, got {init!r}")
