"""Reads steps that a fused inner loop knows: plain, scaled, and with Kronecker factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastkfo.functional.gram import gram_unchecked
from fastkfo.functional.inner_loop_checks import times
from fastkfo.inner_loop.known_models import Unfusable
from fastkfo.inner_loop.step import Rule
from fastkfo.optim.parameter_update import ParameterUpdate
from fastkfo.optim.recognise import is_curvature_of, kind_of, kronecker_part, own_scale


class Step(NamedTuple):
    """The operands of a step, one per parameter: L, R, β, S and the numbers α.

    Attributes:
        psd: whether the call squares the factors.
        derived: whether some operand was computed from what is learned, and belongs to one graph.
        adapt: whether L, R and β take steps too.
    """

    left: list[Tensor | None]
    right: list[Tensor | None]
    bias: list[Tensor | None]
    scale: list[Tensor | None]
    alpha: tuple[float, ...]
    psd: bool
    derived: bool
    adapt: bool


def read_step(rule: Rule, theta: Sequence[Tensor]) -> Step:
    """The operands of a learner's step.

    Args:
        rule: how the learner adapts.
        theta: its parameters.

    Returns:
        The operands.

    Raises:
        Unfusable: a transform is not known.
    """
    adapt = rule.adapt_transform and rule.compute_update is not None
    update = rule.compute_update
    if update is not None and type(update) is not ParameterUpdate:
        raise Unfusable(f"compute_update is a {type(update).__name__}")
    transforms: list[Any] = [None] * len(theta) if update is None else update.transforms()
    if len(transforms) != len(theta):
        raise Unfusable("there is not one transform per parameter")
    rates = rule.lr if isinstance(rule.lr, (list, tuple, nn.ParameterList)) else None
    left: list[Tensor | None] = [None] * len(theta)
    right, bias, scale = list(left), list(left), list(left)
    alpha: list[float] = []
    squared: list[int] = []
    plain: list[int] = []
    derived = False
    for i, (transform, p) in enumerate(zip(transforms, theta, strict=True)):
        rate = rule.lr if rates is None else rates[i]
        factor = 1.0
        if transform is not None:
            kind = kind_of(transform)
            if adapt and kind == "curvature":
                raise Unfusable("adapt_transform: meta-curvature is not adapted in one call")
            part = kronecker_part(transform, p) if kind == "reshaped" else None
            own = own_scale(transform, kind, p) if kind is not None and part is None else None
            if part is not None:
                _check_sizes(i, p, part.left, part.right)
                left[i], right[i], bias[i] = part.left, part.right, part.bias
                (squared if part.psd else plain).append(i)
            elif own is not None:
                scale[i] = own if own.shape == p.shape else own.expand(p.shape)
                derived = derived or own.shape != p.shape
                factor = transform.lr if kind == "curvature" else 1.0
            elif kind == "curvature" and p.dim() == 2 and is_curvature_of(transform, p):
                left[i], right[i] = transform._parameters["mc_in"], transform._parameters["mc_out"]
                factor = transform.lr
                plain.append(i)
            else:
                name = type(transform).__name__
                raise Unfusable(f"the transform of parameter {i}, {name}, is not known")
        if isinstance(rate, Tensor):
            if rate.device != p.device:
                raise Unfusable(f"the learning rate of parameter {i} is on another device")
            if rate.numel() != 1 and rate.shape != p.shape:
                raise Unfusable(f"the learning rate of parameter {i} has a shape of its own")
            derived = derived or scale[i] is not None or rate.shape != p.shape
            scale[i] = times(rate, scale[i], p.shape)
            alpha.append(factor)
        else:
            alpha.append(float(rate) * factor)
    for group in (left, right, bias, scale):
        for i, x in enumerate(group):
            if x is not None and (x.dtype != theta[i].dtype or x.device != theta[i].device):
                raise Unfusable(f"the transform of parameter {i} has another dtype or device")
    if adapt:
        _check_adaptable(rule, (left, right, bias, scale), bool(squared and plain))
    if squared and plain:  # the call squares all factors or none
        factors: list[Any] = [x[i] for x in (left, right) for i in squared]
        squares = gram_unchecked(factors)
        for i, a, c in zip(squared, squares, squares[len(squared) :], strict=False):
            left[i], right[i] = a, c
        derived = True
    return Step(left, right, bias, scale, tuple(alpha), bool(squared) and not plain, derived, adapt)


def _check_adaptable(rule: Rule, groups: Sequence[Sequence[Tensor | None]], mixed: bool) -> None:
    *factors, scale = groups
    if not isinstance(rule.lr, (int, float)) or any([x is not None for x in scale]):
        raise Unfusable("adapt_transform: a learned rate or scale is not adapted in one call")
    if mixed:
        raise Unfusable("adapt_transform: some factors are squared and some are not")
    own = [x for group in factors for x in group if x is not None]
    if any([not x.requires_grad for x in own]):
        raise Unfusable("adapt_transform: some factor requires no gradient")
    if len({id(x) for x in own}) < len(own):
        raise Unfusable("adapt_transform: two parameters share a transform, which takes one step")
    if any([x.shape[-2] != x.shape[-1] for group in factors[:2] for x in group if x is not None]):
        raise Unfusable("adapt_transform: some factor is not square")


def _check_sizes(i: int, p: Tensor, left: Tensor | None, right: Tensor | None) -> None:
    n, m = (p.shape[0], 1) if p.dim() == 1 else (p.shape[0], p.shape[-1])
    for factor, size in ((left, n), (right, m)):
        if p.dim() > 2 or (factor is not None and factor.shape[-1] != size):
            raise Unfusable(f"the transform of parameter {i} sees it in another shape")
