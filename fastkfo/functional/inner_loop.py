"""K inner steps of T tasks, and their exact meta-gradient, in one native call each.

For models that are chains of known layers: linear heads and MLPs, with or without norms. Source:
Finn, Abbeel, Levine 2017; Arnold, Iqbal, Sha 2021; docs/inner_loop.md has the derivation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkfo.functional import checks
from fastkfo.functional.inner_loop_autograd import run
from fastkfo.functional.inner_loop_checks import (
    check_adaptable,
    check_inputs,
    check_layers,
    check_operands,
    choice,
    loss_index,
    rates_of,
)
from fastkfo.functional.inner_loop_spec import FORMS, InnerLoopResult, Spec, flattened
from fastkfo.kernels import selector
from fastkfo.reference.inner_loop import Layer

Operands = Sequence["Tensor | None"]


def inner_loop(
    layers: Sequence[Layer],
    theta: Sequence[Tensor],
    x_s: Tensor,
    y_s: Tensor,
    x_q: Tensor | None = None,
    y_q: Tensor | None = None,
    *,
    steps: int,
    lr: float | Tensor | Sequence[float | Tensor],
    left: Operands | None = None,
    right: Operands | None = None,
    bias: Operands | None = None,
    scale: Operands | None = None,
    psd: bool = False,
    loss: str = "cross_entropy",
    reduction: str = "mean",
    query_loss: str | None = None,
    query_reduction: str | None = None,
    first_order: bool = False,
    adapt_transform: bool = False,
    adapted: bool = False,
    form: str = "auto",
    implementation: str = "auto",
) -> InnerLoopResult:
    """Adapt T tasks at once, and ask for their query losses.

    For k = 0 … K − 1, `θ_{k+1} = θ_k − lr · S ∘ (A g_k C + β)` with `g_k = ∇ℓ_s(θ_k)` per task;
    then ℓ_q(θ_K). A is `left`, or `leftᵀ left` with `psd`; C is `right`, or `rightᵀ right`; an
    operand that is None is absent. A vector's gradient counts as n × 1. With `adapt_transform` the
    operands φ = (L, R, β) take steps too, before each step k ≥ 1:
    `φ_k = φ_{k−1} + lr² (∂U_{φ_{k−1}}(g_{k−1}) / ∂φ)ᵀ g_k`.

    Differentiable in every floating-point tensor but the targets. The derivative is a kernel; its
    own derivatives (a third order of the model) are those of the reference, which is run for them.
    A task whose numbers are not finite, or whose cotangent is zero, contributes exactly nothing to
    gradients of what tasks share.

    Args:
        layers: the model, from its inputs to its outputs: see `Layer`. Kinds are "linear", "relu",
            "leaky_relu", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "batch_norm" (on batch
            statistics) and "layer_norm".
        theta: θ_0, one tensor per parameter, `[n, m]` for a linear layer's weight and `[n]`
            otherwise, or with a leading T.
        x_s: support inputs `[T, S, m]`, float32 or float64 as all operands.
        y_s: support targets, labels `[T, S]` of int64 for cross-entropy, `[T, S, C]` for "mse".
        x_q: query inputs `[T, Q, m]`, or None.
        y_q: query targets likewise, or None.
        steps: K, at least 0.
        lr: the learning rate; or one per parameter, a number, or a tensor of its shape or a scalar.
        left: L, `[T?, n, n]` (`[T?, r, n]` with `psd`), per parameter or None.
        right: R, `[T?, m, m]` (`[T?, r, m]`), likewise.
        bias: β, of the parameter's shape, or `[n, 1]`, likewise.
        scale: S, of the parameter's shape, likewise.
        psd: whether factors are squared.
        loss: of the support, "cross_entropy" or "mse".
        reduction: over a task's samples, "mean" or "sum".
        query_loss: of the query; None: the same.
        query_reduction: of the query; None: the same.
        first_order: whether the g_k count as constants.
        adapt_transform: whether L, R and β are adapted too. Factors are square then; there is no S
            and no rate that is a tensor.
        adapted: whether θ_K is returned.
        form: how the kernels compute a linear layer's step, A G C with G = D Xᵀ: "dense" as it
            stands, "factored" as (A D)(Xᵀ C), "gram" (a first layer only, no S, no `adapted`) by
            Xᵀ C X; "auto" counts multiplications, and with `adapt_transform` is the dense one.
            All are exact; a layer that one does not fit is computed in the factored form.
        implementation: "auto", "native" or "reference".

    Returns:
        See `InnerLoopResult`.

    Raises:
        TypeError: an operand is no tensor or of another dtype.
        ValueError: shapes, devices or options do not fit, or (on the CPU) a label is out of range.
        ImplementationUnavailable: the implementation named is not available.
    """
    layers = tuple(layers)
    check_layers(layers, len(theta))
    checks.floating_tensor("x_s", x_s)
    choice("form", form, tuple(FORMS))
    kinds = (
        loss_index("", loss, reduction),
        loss_index("query_", query_loss or loss, query_reduction or reduction),
    )
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
    if steps < 0:
        raise ValueError(f"steps: expected at least 0, got {steps}")
    check_inputs(layers, x_s, y_s, x_q, y_q, kinds)
    count = len(theta)
    groups: list[list[Any]] = [list(theta)]
    for name, group in (("left", left), ("right", right), ("bias", bias), ("scale", scale)):
        if group is not None and len(group) != count:
            raise ValueError(f"{name}: expected {count} entries as in theta, got {len(group)}")
        groups.append([None] * count if group is None else list(group))
    alpha = rates_of(lr, groups, layers)
    check_operands(layers, groups, x_s, psd)
    if adapt_transform:
        check_adaptable(groups)
    chosen = selector.select(implementation, x_s.device, "inner_loop")
    if x_s.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x_s: expected float32 or float64, got {x_s.dtype}")
    present, flat = flattened(groups)
    spec = Spec(
        layers,
        present,
        alpha,
        steps,
        kinds,
        psd,
        first_order,
        adapted,
        chosen == "native",
        form,
        adapt_transform,
    )
    return run(spec, flat, x_s, y_s, x_q, y_q)
