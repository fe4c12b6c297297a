"""K inner steps of T tasks in plain PyTorch, for models that are chains of known layers.

    z_k = model(θ_k, x_s)    g_k = ∇ℓ_s(z_k)    θ_{k+1} = θ_k − α S ∘ (A_k g_k C_k + β_k)

All tensors have a leading axis of tasks, or are shared by all tasks; a vector's gradient is n × 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkfo.reference.cross_entropy import cross_entropy
from fastkfo.reference.norm import batch_norm

Tensors = Sequence["Tensor | None"]


class Layer(NamedTuple):
    """One layer of a chain.

    Attributes:
        kind: a name in `KINDS`.
        in_features: numbers per sample that come in.
        out_features: numbers per sample that go out.
        weight: which of the parameters is its weight, −1 for none.
        bias: which is its bias, −1 for none.
        constant: eps of a norm, the slope of a leaky ReLU.
    """

    kind: str
    in_features: int
    out_features: int
    weight: int = -1
    bias: int = -1
    constant: float = 0.0


class Result(NamedTuple):
    """What an inner loop gives.

    Attributes:
        loss: query losses `[T]`, or None without targets.
        predictions: of the query, `[T, Q, C]`, or None without query inputs.
        support_loss: `[T, K]`.
        theta: θ_K, `[T, ...]` each.
        statistics: mean and biased variance of every batch norm, one pass after the other,
            `[T, passes, F]`, detached.
    """

    loss: Tensor | None
    predictions: Tensor | None
    support_loss: Tensor
    theta: list[Tensor]
    statistics: Tensor


ELEMENTWISE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda z, _: F.relu(z),
    "leaky_relu": F.leaky_relu,
    "tanh": lambda z, _: torch.tanh(z),
    "sigmoid": lambda z, _: torch.sigmoid(z),
    "silu": lambda z, _: F.silu(z),
    "gelu": lambda z, _: F.gelu(z),
    "gelu_tanh": lambda z, _: F.gelu(z, approximate="tanh"),
}
# In the order of the kernels' numbers, csrc/inner_loop/plan.h.
KINDS = ("linear", *ELEMENTWISE, "batch_norm", "layer_norm")
LOSSES = ("cross_entropy_mean", "cross_entropy_sum", "mse_mean", "mse_sum")


def inner_loop(
    layers: Sequence[Layer],
    theta: Sequence[Tensor],
    left: Tensors,
    right: Tensors,
    bias: Tensors,
    scale: Tensors,
    x_s: Tensor,
    y_s: Tensor,
    x_q: Tensor | None,
    y_q: Tensor | None,
    *,
    alpha: Sequence[float],
    steps: int,
    loss: str,
    query_loss: str,
    psd: bool = False,
    adapt: bool = False,
    first_order: bool = False,
    create_graph: bool = True,
) -> Result:
    """All steps, with their graph.

    Args:
        layers: the model.
        theta: θ_0, `[T?, n, m]` or `[T?, n]`.
        left: L, `[T?, n, n]`, per parameter or None: A, or with `psd` its root.
        right: R, `[T?, m, m]`, likewise.
        bias: β, of θ's shape or `[n, 1]` for a vector, likewise.
        scale: S, of θ's shape, likewise.
        x_s: support inputs `[T, S, m]`.
        y_s: support targets: labels `[T, S]`, or numbers `[T, S, C]`.
        x_q: query inputs `[T, Q, m]`, or None.
        y_q: query targets, or None.
        alpha: one learning rate per parameter.
        steps: K, the number of steps.
        loss: of the support, a name in `LOSSES`.
        query_loss: of the query.
        psd: whether A = LᵀL and C = RᵀR.
        adapt: whether L, R and β take steps too.
        first_order: whether gradients are constants.
        create_graph: whether the result shall be differentiable.

    Returns:
        See `Result`.
    """
    tasks = x_s.shape[0]
    ranks = _ranks(layers, len(theta))
    now = [
        p if p.dim() > rank else p.expand(tasks, *p.shape)
        for p, rank in zip(theta, ranks, strict=True)
    ]
    support: list[Tensor] = []
    seen: list[list[Tensor]] = []
    phi = [list(left), list(right), list(bias)]
    before: Sequence[Tensor] = ()
    for k in range(steps):
        with torch.enable_grad():
            graph = create_graph and not first_order
            point = [
                p if create_graph and p.requires_grad else p.detach().requires_grad_() for p in now
            ]
            losses = value(loss, forward(layers, point, x_s, seen), y_s)
            grads = torch.autograd.grad(losses.sum(), point, create_graph=graph)
        support.append(losses.detach())
        if adapt and k > 0:
            moved = [
                adapted(before[i], g, phi[0][i], phi[1][i], phi[2][i], alpha[i], psd)
                for i, g in enumerate(grads)
            ]
            phi = [list(x) for x in zip(*moved, strict=True)]
        before = grads
        now = [
            p - alpha[i] * update(g, phi[0][i], phi[1][i], phi[2][i], scale[i], psd)
            for i, (p, g) in enumerate(zip(now, grads, strict=True))
        ]
    predictions = None if x_q is None else forward(layers, now, x_q, seen)
    total = None if predictions is None or y_q is None else value(query_loss, predictions, y_q)
    stacked = torch.stack(support, 1) if support else x_s.new_zeros(tasks, 0)
    passes = [torch.cat(x, 1) if x else x_s.new_empty(tasks, 0) for x in seen]
    statistics = torch.stack(passes, 1) if passes else x_s.new_empty(tasks, 0, 0)
    return Result(total, predictions, stacked, now, statistics)


def update(
    g: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    psd: bool = False,
) -> Tensor:
    """`S ∘ (A G C + β)` of T tasks, G `[T, n, m]` or `[T, n]`."""
    u = g.unsqueeze(-1) if g.dim() == 2 else g
    left, right = square(left, psd), square(right, psd)
    u = u if left is None else left @ u
    u = u if right is None else u @ right
    u = u.reshape(g.shape)
    if bias is not None:
        u = u + (bias if bias.shape[-g.dim() + 1 :] == g.shape[1:] else bias.squeeze(-1))
    return u if scale is None else scale * u


def square(factor: Tensor | None, psd: bool) -> Tensor | None:
    """`LᵀL`, or L itself."""
    return factor.mT @ factor if factor is not None and psd else factor


def adapted(
    before: Tensor,
    g: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    bias: Tensor | None,
    alpha: float,
    psd: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`φ + α² (∂U_φ(G) / ∂φ)ᵀ H` for L, R and β, with G `before` and H `g`."""
    rate = alpha * alpha
    shape = g.shape
    if g.dim() == 2:
        before, g = before.unsqueeze(-1), g.unsqueeze(-1)
    a, c = square(left, psd), square(right, psd)

    def step(factor: Tensor | None, cotangent: Tensor) -> Tensor | None:
        if factor is None:
            return None
        return factor + rate * (factor @ (cotangent + cotangent.mT) if psd else cotangent)

    through = before if c is None else before @ c
    back = g if a is None else a.mT @ g
    if bias is not None:
        bias = bias if bias.shape[-len(shape) + 1 :] == shape[1:] else bias.squeeze(-1)
        bias = bias + rate * g.reshape(shape)
    return step(left, g @ through.mT), step(right, before.mT @ back), bias


def forward(
    layers: Sequence[Layer], theta: Sequence[Tensor], x: Tensor, seen: list[list[Tensor]]
) -> Tensor:
    """The model for T tasks, `[T, S, m]` to `[T, S, C]`; statistics of norms go to `seen`."""
    statistics: list[Tensor] = []
    seen.append(statistics)
    for layer in layers:
        weight = theta[layer.weight] if layer.weight >= 0 else None
        bias = theta[layer.bias] if layer.bias >= 0 else None
        if layer.kind == "linear":
            assert weight is not None
            x = x @ weight.mT
            x = x if bias is None else x + bias.unsqueeze(1)
        elif layer.kind == "batch_norm":
            x, mean, var = batch_norm(x, weight, bias, layer.constant)
            statistics += [mean.detach(), var.detach()]
        elif layer.kind == "layer_norm":
            x = F.layer_norm(x, x.shape[-1:], eps=layer.constant)
            x = x if weight is None else x * weight.unsqueeze(1)
            x = x if bias is None else x + bias.unsqueeze(1)
        else:
            x = ELEMENTWISE[layer.kind](x, layer.constant)
    return x


def value(loss: str, predictions: Tensor, targets: Tensor) -> Tensor:
    """The loss of every task, `[T]`."""
    if loss.startswith("cross_entropy"):
        mean = cross_entropy(predictions, targets)[0]
        return mean * predictions.shape[1] if loss.endswith("sum") else mean
    squares = (predictions - targets).square().flatten(1)
    return squares.sum(1) if loss.endswith("sum") else squares.mean(1)


def _ranks(layers: Sequence[Layer], count: int) -> list[int]:
    """How many axes every parameter has without that of the tasks."""
    matrices = {layer.weight for layer in layers if layer.kind == "linear"}
    return [2 if i in matrices else 1 for i in range(count)]
