"""From transform modules to one fused op: all parameters of a learner in one call.

Only what is known exactly is fused: this package's and learn2learn's own classes, without hooks
and with their own `forward`. Every other transform is called, and its result joins the same op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from fastkfo.functional.gram import gram_unchecked
from fastkfo.functional.kron import BIAS, GRAD, LEFT, PARAM, RIGHT, SCALE, kron_unchecked

Rate = Any  # a number, or a tensor

_KNOWN = {
    "optim.transforms.module_transform.ReshapedTransform": "reshaped",
    "optim.transforms.metacurvature_transform.MetaCurvatureTransform": "curvature",
    "nn.kroneckers.KroneckerLinear": "kronecker",
    "nn.misc.Scale": "scale",
}
_kinds: dict[type, str | None] = {}


def _kind(module: nn.Module) -> str | None:
    """What a module exactly is, or None if its `forward` has to be called."""
    cls = type(module)
    if cls not in _kinds:
        package, _, rest = f"{cls.__module__}.{cls.__qualname__}".partition(".")
        _kinds[cls] = _KNOWN.get(rest) if package in ("fastkfo", "learn2learn") else None
    kind = _kinds[cls]
    if kind is None or not _plain(module):
        return None
    return kind


def _plain(module: nn.Module) -> bool:
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def _global_hooks() -> bool:
    return bool(
        module_globals._global_forward_hooks
        or module_globals._global_forward_pre_hooks
        or module_globals._global_backward_hooks
        or module_globals._global_backward_pre_hooks
    )


class GramCache:
    """`LᵀL` of a clone's factors, which stay the same from step to step.

    It lives as long as one clone: a new clone's factors are other tensors. What no longer holds is
    computed anew: other factors, changed ones, or a graph that a backward pass has freed.
    """

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.factors: list[Tensor] = []  # kept, so that no other tensor can take their identity
        self.squares: list[Tensor] = []

    def get(self, factors: list[Tensor]) -> list[Tensor]:
        """The squares of the factors, one tensor each."""
        key = (torch.is_grad_enabled(), *[(id(x), x._version, x.requires_grad) for x in factors])
        if key != self.key or not self._alive():
            self.squares = gram_unchecked(factors)
            self.key, self.factors = key, factors
        return self.squares

    def _alive(self) -> bool:
        node = self.squares[0].grad_fn if self.squares else None
        if node is None:
            return not any(x.requires_grad for x in self.squares)
        try:
            return node.saved_tensors is not None  # type: ignore[attr-defined]
        except (RuntimeError, AttributeError):
            return False


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
        for name, x in (("left", left), ("right", right), ("bias", bias), ("scale", scale)):
            if x is not None:
                _check_like(f"the transform's {name}", x, grad, index)
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
    transforms: Sequence[nn.Module | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Apply every transform to its gradient.

    Args:
        transforms: one module or None (leave the gradient as it is) per parameter.
        grads: one gradient or None per parameter.

    Returns:
        The updates; None where the gradient is None.

    Raises:
        TypeError: a transform returned no tensor, or its dtype is not the gradient's.
        ValueError: a transform returned the wrong shape.
    """
    items = _gather(transforms, grads, None, skip_plain=True)
    items.square_factors(None)
    updates = list(grads)
    for i, update in zip(items.index, items.run(), strict=True):
        updates[i] = update
    return updates


def updated_parameters(
    transforms: Sequence[nn.Module | None] | None,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    lr: Rate,
    cache: GramCache | None = None,
) -> dict[int, Tensor]:
    """Every parameter after one step, `θ − lr · transform(g)`.

    Args:
        transforms: one module or None per parameter, or None for plain gradients.
        params: θ.
        grads: g, of its parameter's shape; None leaves a parameter as it is.
        lr: a number, a tensor, or a list of tensors, one per parameter, of its shape or a scalar.
        cache: squares of factors to be used again.

    Returns:
        From `id(θ)` to the new tensor.

    Raises:
        TypeError: dtypes do not match.
        ValueError: shapes, lengths or devices do not match.
    """
    if len(grads) != len(params):
        raise ValueError(
            f"gradients: expected {len(params)}, one per parameter, got {len(grads)}"
        )
    transforms = [None] * len(params) if transforms is None else transforms
    if len(transforms) != len(params):
        raise ValueError(
            f"parameters: expected {len(transforms)}, one per transform, got {len(params)}"
        )
    items = _gather(transforms, grads, lr, skip_plain=False)
    chosen = [params[i] for i in items.index]
    for i, param, grad in zip(items.index, chosen, items.groups[GRAD], strict=True):
        _check_like("the gradient", grad, param, i)
        if grad.shape != param.shape:
            raise ValueError(
                f"the gradient for parameter {i}: expected shape {list(param.shape)}, "
                f"got {list(grad.shape)}"
            )
    items.square_factors(cache)
    items.groups[PARAM] = chosen
    return {id(param): new for param, new in zip(chosen, items.run(), strict=True)}


def _gather(
    transforms: Sequence[nn.Module | None],
    grads: Sequence[Tensor | None],
    lr: Rate,
    skip_plain: bool,
) -> Items:
    items, first = Items(), Items()
    hooked = _global_hooks()
    curvature: list[tuple[nn.Module, float, Tensor | None]] = []
    for i, (transform, grad) in enumerate(zip(transforms, grads, strict=True)):
        if grad is None:
            continue
        rate = lr[i] if isinstance(lr, (list, tuple, nn.ParameterList)) else lr
        # A rate that is a tensor multiplies element by element, as a scale does.
        scale = _rate_scale(rate, grad, i) if isinstance(rate, Tensor) else None
        alpha = 1.0 if rate is None else (-1.0 if scale is not None else -float(rate))
        if transform is None:
            if not skip_plain:
                items.add(i, _flat(grad), alpha, grad, scale=scale)
            continue
        kind = None if hooked else _kind(transform)
        if kind == "reshaped" and _add_kronecker(items, i, alpha, grad, transform, scale):
            continue
        if kind == "scale":
            own = transform._parameters["alpha"]
            if own is not None and (own.shape == grad.shape or own.numel() == 1):
                items.add(i, _flat(grad), alpha, grad, scale=own if scale is None else scale * own)
                continue
        if kind == "curvature" and isinstance(transform.lr, (int, float)):
            mc = transform._parameters
            if transform.dim == 1 and mc["mc"].shape == grad.shape:  # type: ignore[union-attr]
                own = mc["mc"] if scale is None else scale * mc["mc"]  # type: ignore[operator]
                items.add(i, _flat(grad), alpha * transform.lr, grad, scale=own)
                continue
            if transform.dim == 2:
                items.add(i, (1, 1, *grad.shape), alpha * transform.lr, grad,  # type: ignore[arg-type]
                          mc["mc_in"], mc["mc_out"], scale=scale)  # fmt: skip
                continue
            if transform.dim > 2 and grad.shape[:2] == (transform.n_in, transform.n_out):
                # Two matrices on the last axes now, the third on the first axis in the main call.
                dims = (1, transform.n_in, transform.n_out, transform.n_f)
                first.add(i, dims, 1.0, grad, mc["mc_out"].t(), mc["mc_f"].t())  # type: ignore[union-attr, arg-type]
                curvature.append((transform, alpha * transform.lr, scale))
                continue
        update = _called(transform, grad, i)
        items.add(i, _flat(grad), alpha, update, scale=scale)
    for i, (transform, alpha, scale), grad in zip(first.index, curvature, first.run(), strict=True):
        dims = (1, 1, transform.n_in, transform.n_out * transform.n_f)
        items.add(i, dims, alpha, grad, transform._parameters["mc_in"], scale=scale)  # type: ignore[arg-type]
    return items


def _flat(grad: Tensor) -> tuple[int, int, int, int]:
    return 1, 1, 1, grad.numel()


def _rate_scale(rate: Tensor, grad: Tensor, index: int) -> Tensor:
    if rate.dtype != grad.dtype and rate.is_floating_point():
        rate = rate.to(grad.dtype)
    if rate.numel() == 1 or rate.shape == grad.shape:
        return rate
    try:
        return rate.expand(grad.shape)
    except RuntimeError:
        raise ValueError(
            f"lr for parameter {index}: expected a scalar or shape {list(grad.shape)}, "
            f"got {list(rate.shape)}"
        ) from None


def _add_kronecker(
    items: Items, i: int, alpha: float, grad: Tensor, reshaped: nn.Module, scale: Tensor | None
) -> bool:
    """Add the item of a `ReshapedTransform(KroneckerLinear)`; False if it is none."""
    linear: Any = reshaped._modules["transform"]
    if linear is None or _kind(linear) != "kronecker":
        return False
    factors = linear._parameters
    left, right, bias = factors["left"], factors["right"], factors.get("bias")
    n, m = left.shape[0], right.shape[0]
    if tuple(reshaped.in_shape) != (-1, n, m) or grad.numel() % max(1, n * m):  # type: ignore[arg-type]
        return False
    if linear.device is not None and torch.device(linear.device).type != grad.device.type:
        return False  # it moves the gradient to a device of its own
    batch = grad.numel() // (n * m) if n * m else math.prod(grad.shape[:-2])
    items.add(i, (1, batch, n, m), alpha, grad, left, right, bias, scale, linear.psd)
    return True


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
