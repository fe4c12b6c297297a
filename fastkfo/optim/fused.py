"""From transform modules to one fused op: all parameters of a learner in one call.

Only what is known exactly is fused (recognise.py). Every other transform is called, and its result
joins the same update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkfo.functional.checks import autocast_enabled
from fastkfo.functional.gram import gram_unchecked
from fastkfo.functional.kron import kron_unchecked
from fastkfo.functional.kron_layout import BIAS, GRAD, LEFT, PARAM, RIGHT, SCALE
from fastkfo.optim.clone_cache import GramCache, KroneckerStep
from fastkfo.optim.recognise import (
    global_hooks,
    is_curvature_of,
    kind_of,
    kronecker_part,
    own_scale,
)
from fastkfo.utils import ParameterSlots

Rate = Any  # a number, or a tensor


class TaskAxis:
    """A leading axis of tasks, `[T, ...]`, of parameters and gradients.

    Args:
        size: T, the number of tasks.
        own: whether the transforms' parameters have it too: each task its own.
    """

    def __init__(self, size: int, own: bool) -> None:
        self.size, self.own = size, own

    def transformed(self, transforms: list[nn.Module], grads: list[Tensor]) -> list[Tensor]:
        """The updates of transforms that are not fused for tasks, under vmap or else in turn."""
        slots = [ParameterSlots(transform) for transform in transforms]
        phi = [s.params for s in slots]

        def one(phi: list[list[Tensor]], grads: list[Tensor]) -> list[Tensor]:
            for s, params in zip(slots, phi, strict=True):
                s.put(params)
            return transform_gradients(transforms, grads)  # type: ignore[return-value]

        def row(t: int) -> list[Tensor]:
            mine = [[p[t] for p in params] for params in phi] if self.own else phi
            return one(mine, [g[t] for g in grads])

        try:
            in_dims = (0 if self.own else None, 0)
            updates: list[Tensor] = torch.func.vmap(one, in_dims, randomness="different")(
                phi, grads
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            rows = [row(t) for t in range(self.size)]
            updates = [torch.stack(of_tasks) for of_tasks in zip(*rows, strict=True)]
        finally:
            for s, params in zip(slots, phi, strict=True):
                s.put(params)
        return updates


class Items:
    """Operands of one fused call, gathered parameter by parameter."""

    def __init__(self) -> None:
        self.index: list[int] = []
        self.dims: list[int] = []
        self.alpha: list[float] = []
        self.groups: dict[int, list[Any]] = {b: [] for b in (PARAM, GRAD, LEFT, RIGHT, BIAS, SCALE)}
        self.psd: list[tuple[int, int]] = []  # (bit, item) of factors to be squared

    def add(
        self,
        index: int,
        dims: tuple[int, int, int, int],
        alpha: float,
        grad: Tensor,
        left: Tensor | None = None,
        right: Tensor | None = None,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        psd: bool = False,
    ) -> None:
        """Add the item of parameter `index`."""
        for name, x in (("left", left), ("right", right), ("bias", bias)):
            if x is not None:
                _check_like(f"the transform's {name}", x, grad, index)
        if scale is not None:  # a learning rate that is a tensor
            _check_like("lr", scale, grad, index)
        if psd:
            self.psd += [(LEFT, len(self.index)), (RIGHT, len(self.index))]
        self.index.append(index)
        self.dims += dims
        self.alpha.append(alpha)
        groups = self.groups
        groups[GRAD].append(grad)
        groups[LEFT].append(left)
        groups[RIGHT].append(right)
        groups[BIAS].append(bias)
        groups[SCALE].append(scale)

    def square_factors(self, cache: GramCache | None) -> None:
        """Replace the factors of psd items by their squares."""
        if self.psd:
            factors = [self.groups[bit][k] for bit, k in self.psd]
            squares = cache.get(factors) if cache is not None else gram_unchecked(factors)
            for (bit, k), square in zip(self.psd, squares, strict=True):
                self.groups[bit][k] = square

    def is_one_product(self) -> bool:
        """Whether there is a single `A G C`, which costs less as two products of PyTorch."""
        others = (self.groups[BIAS], self.groups[SCALE])
        return (
            len(self.index) == 1
            and self.dims[:2] == [1, 1]
            and not self.psd
            and self.groups[GRAD][0].dim() == 2
            and not autocast_enabled(self.groups[GRAD][0].device)  # ours stays in float32
            and all([group[0] is None for group in others])
        )

    def product(self) -> Tensor:
        """The one product."""
        grad, left, right = (self.groups[bit][0] for bit in (GRAD, LEFT, RIGHT))
        grad = grad if left is None else left @ grad
        return grad if right is None else grad @ right

    def run(self) -> list[Tensor]:
        """One result per item, in the shape of its gradient."""
        if not self.index:
            return []
        groups = {bit: group for bit, group in self.groups.items() if group}
        return kron_unchecked(tuple(self.dims), tuple(self.alpha), groups)


def _check_like(name: str, x: Tensor, grad: Tensor, index: int) -> None:
    if x.dtype != grad.dtype:
        raise TypeError(
            f"{name} for parameter {index}: expected {grad.dtype} as the gradient, got {x.dtype}"
        )
    if x.device != grad.device:
        raise ValueError(
            f"{name} for parameter {index}: expected device {grad.device}, got {x.device}"
        )


def transform_gradients(
    transforms: Sequence[nn.Module | None],
    grads: Sequence[Tensor | None],
    cache: GramCache | None = None,
    tasks: TaskAxis | None = None,
) -> list[Tensor | None]:
    """Apply every transform to its gradient.

    Args:
        transforms: one module or None (leave the gradient as it is) per parameter.
        grads: one gradient or None per parameter.
        cache: squares of factors to be used again.
        tasks: says that gradients have a leading axis of tasks.

    Returns:
        The updates; None where the gradient is None.

    Raises:
        TypeError: a transform returned no tensor, or its dtype is not the gradient's.
        ValueError: a transform returned the wrong shape.
    """
    items, simple = _gather(transforms, grads, None, tasks)
    updates = list(grads)
    for i, grad, alpha, scale in simple:
        update = grad if scale is None else scale * grad
        updates[i] = update if alpha == 1.0 else alpha * update
    items.square_factors(cache)
    for i, update in zip(items.index, items.run(), strict=True):
        updates[i] = update
    return updates


def updated_parameters(
    transforms: Sequence[nn.Module | None] | None,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    lr: Rate,
    cache: GramCache | None = None,
    tasks: TaskAxis | None = None,
) -> list[Tensor]:
    """Every parameter after one step, `θ − lr · transform(g)`.

    Args:
        transforms: one module or None per parameter, or None for plain gradients.
        params: θ.
        grads: g, of its parameter's shape; None leaves a parameter as it is.
        lr: a number, a tensor, or a list of tensors, one per parameter, of its shape or a scalar.
        cache: squares of factors to be used again.
        tasks: says that θ and g have a leading axis of tasks.

    Returns:
        The new tensors; the old one where the gradient is None.

    Raises:
        TypeError: dtypes do not match.
        ValueError: shapes, lengths or devices do not match.
    """
    if len(grads) != len(params):
        raise ValueError(f"gradients: expected {len(params)}, one per parameter, got {len(grads)}")
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is not None:
            _check_like("the gradient", grad, param, i)
            if grad.shape != param.shape:
                raise ValueError(
                    f"the gradient for parameter {i}: expected shape {list(param.shape)}, "
                    f"got {list(grad.shape)}"
                )
    if transforms is None:
        return [
            param if grad is None else _plain_step(param, grad, lr, i)
            for i, (param, grad) in enumerate(zip(params, grads, strict=True))
        ]
    if len(transforms) != len(params):
        raise ValueError(
            f"parameters: expected {len(transforms)}, one per transform, got {len(params)}"
        )
    whole = not any([g is None for g in grads])  # not `None in grads`, which compares tensors
    if cache is not None and whole and not (tasks is not None and tasks.own):
        if cache.step is None or not cache.step.matches(transforms, grads, lr, cache):
            cache.step = KroneckerStep.of(transforms, grads, lr, cache)
        if cache.step is not None:
            return cache.step.take(params, grads)
    items, simple = _gather(transforms, grads, lr, tasks)
    new = list(params)
    for i, grad, alpha, scale in simple:
        new[i] = _scaled_step(params[i], grad, alpha, scale)
    if items.is_one_product():
        i = items.index[0]
        new[i] = _scaled_step(params[i], items.product(), items.alpha[0], None)
    elif items.index:
        items.square_factors(cache)
        items.groups[PARAM] = [params[i] for i in items.index]
        for i, result in zip(items.index, items.run(), strict=True):
            new[i] = result
    return new


# Without factors there is nothing to fuse that one elementwise op of PyTorch does not do.
def _plain_step(param: Tensor, grad: Tensor, lr: Rate, index: int) -> Tensor:
    rate = lr[index] if isinstance(lr, (list, tuple)) else lr
    if isinstance(rate, Tensor):
        return torch.addcmul(param, _rate_scale(rate, grad, index), grad, value=-1)
    return torch.add(param, grad, alpha=-rate)


def _scaled_step(param: Tensor, grad: Tensor, alpha: float, scale: Tensor | None) -> Tensor:
    if scale is None:
        return torch.add(param, grad, alpha=alpha)
    return torch.addcmul(param, scale, grad, value=alpha)


Simple = list[tuple[int, Tensor, float, "Tensor | None"]]  # index, gradient, alpha, scale


def _gather(
    transforms: Sequence[Any], grads: Sequence[Tensor | None], lr: Rate, tasks: TaskAxis | None
) -> tuple[Items, Simple]:
    """Gather the parameters' items with factors, and those that are a scaled gradient.

    Args:
        transforms: one module or None per parameter.
        grads: one gradient or None per parameter.
        lr: the learning rate; with None, plain gradients are left out.
        tasks: see `updated_parameters`.

    Returns:
        The items, and the scaled gradients.
    """
    items, first = Items(), Items()
    simple: Simple = []
    hooked = global_hooks()
    # A rate that is a tensor multiplies element by element, as a scale does.
    tensor_rate = isinstance(lr, Tensor)
    alpha = 1.0 if lr is None else -1.0 if tensor_rate else -lr
    curvature: list[tuple[Any, float, Tensor | None]] = []
    mapped: list[tuple[int, nn.Module, Tensor, float, Tensor | None]] = []
    for i, (transform, grad) in enumerate(zip(transforms, grads, strict=True)):
        if grad is None or (transform is None and lr is None):
            continue
        scale = _rate_scale(lr, grad, i) if tensor_rate else None
        if transform is None:
            simple.append((i, grad, alpha, scale))
            continue
        kind = None if hooked else kind_of(transform)
        own_tasks = tasks.size if tasks is not None and tasks.own else None
        part = kronecker_part(transform, grad, own_tasks) if kind == "reshaped" else None
        if part is not None:
            items.add(i, part.dims, alpha, grad, part.left, part.right, part.bias, scale, part.psd)
            continue
        if tasks is not None:
            mapped.append((i, transform, grad, alpha, scale))
            continue
        own = own_scale(transform, kind, grad)
        if own is not None:
            _check_like("the transform's scale", own, grad, i)
            factor = transform.lr if kind == "curvature" else 1.0
            simple.append((i, grad, alpha * factor, own if scale is None else scale * own))
        elif kind == "curvature" and is_curvature_of(transform, grad):
            mc, factor = transform._parameters, alpha * transform.lr
            if transform.dim == 2:
                items.add(
                    i, (1, 1, *grad.shape), factor, grad, mc["mc_in"], mc["mc_out"], None, scale
                )
            else:  # two matrices on the last axes first, the third on the first axis with the rest
                dims = (1, transform.n_in, transform.n_out, transform.n_f)
                first.add(i, dims, 1.0, grad, mc["mc_out"].t(), mc["mc_f"].t())
                curvature.append((transform, factor, scale))
        else:
            simple.append((i, _called(transform, grad, i), alpha, scale))
    if mapped:
        assert tasks is not None
        updates = tasks.transformed([m[1] for m in mapped], [m[2] for m in mapped])
        for (i, _, _, alpha_, scale), update in zip(mapped, updates, strict=True):
            simple.append((i, update, alpha_, scale))
    for i, (t, factor, scale), grad in zip(first.index, curvature, first.run(), strict=True):
        dims = (1, 1, t.n_in, t.n_out * t.n_f)
        items.add(i, dims, factor, grad, t._parameters["mc_in"], None, None, scale)
    return items, simple


def _rate_scale(rate: Tensor, grad: Tensor, index: int) -> Tensor:
    if rate.device != grad.device and (rate.dim() > 0 or rate.device.type != "cpu"):
        raise ValueError(
            f"lr for parameter {index}: expected device {grad.device}, got {rate.device}"
        )
    if rate.dtype != grad.dtype and rate.is_floating_point():
        rate = rate.to(grad.dtype)
    if rate.shape == grad.shape:
        return rate
    if rate.numel() == 1:
        return rate.reshape(())  # so that it cannot add axes
    try:
        return rate.expand(grad.shape)
    except RuntimeError:
        raise ValueError(
            f"lr for parameter {index}: expected a scalar or shape {list(grad.shape)}, "
            f"got {list(rate.shape)}"
        ) from None


def _called(transform: nn.Module, grad: Tensor, index: int) -> Tensor:
    update = transform(grad)
    if not isinstance(update, Tensor):
        raise TypeError(
            f"the transform for parameter {index}: expected it to return a tensor, "
            f"got {type(update).__name__}"
        )
    if update.shape != grad.shape:
        raise ValueError(
            f"the transform for parameter {index}: expected it to return shape "
            f"{list(grad.shape)}, got {list(update.shape)}"
        )
    return update.to(grad.dtype)  # autocast may have lowered it
