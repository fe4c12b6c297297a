"""From transform modules to one fused op: all parameters of a learner in one call.

Only what is known exactly is fused: this package's and learn2learn's own classes, without hooks
and with their own `forward`. Every other transform is called, and its result joins the same op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from fastkfo.functional.checks import by_dtype_and_device
from fastkfo.functional.function import apply
from fastkfo.functional.gram import gram_unchecked
from fastkfo.functional.kron import kron_unchecked
from fastkfo.functional.kron_autograd import KronForward
from fastkfo.functional.kron_layout import BIAS, GRAD, LEFT, PARAM, RIGHT, SCALE
from fastkfo.kernels.selector import select

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
        self.key: list[Any] = []
        self.factors: list[Tensor] = []  # kept, so that no other tensor can take their identity
        self.squares: list[Tensor] = []
        self.step: KroneckerStep | None = None

    def get(self, factors: list[Tensor]) -> list[Tensor]:
        """The squares of the factors, one tensor each."""
        if not self.holds(factors):
            self.squares = gram_unchecked(factors)
            self.key, self.factors = self._key(factors), factors
        return self.squares

    def holds(self, factors: list[Tensor]) -> bool:
        """Whether the squares are those of these factors, with a graph that is there."""
        return self._key(factors) == self.key and self._alive()

    def _key(self, factors: list[Tensor]) -> list[Any]:
        # Detached in place, a factor has another graph; assigned through `.data`, other memory.
        parts = [(id(x), x._version, x.is_leaf, x.requires_grad, x.data_ptr()) for x in factors]
        return [torch.is_grad_enabled(), *parts]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled empty: squares have a graph, which can be neither."""
        return GramCache, ()

    def _alive(self) -> bool:
        node = self.squares[0].grad_fn if self.squares else None
        if node is None:
            return not any([x.requires_grad for x in self.factors]) or not self.key[0]
        try:
            return node.saved_tensors is not None  # type: ignore[attr-defined]
        except (RuntimeError, AttributeError):
            return False


class KroneckerStep:
    """The step of a clone whose transforms are all Kronecker, ready to be taken again.

    Between the steps of a clone only θ and its gradient change. `matches` makes sure of that, at a
    fraction of what gathering the operands costs.
    """

    @staticmethod
    def of(
        transforms: Sequence[Any], grads: Sequence[Any], lr: Rate, cache: GramCache
    ) -> KroneckerStep | None:
        """The step, or None where it is not Kronecker alone, or not one native call."""
        if not transforms or isinstance(lr, (Tensor, list, tuple)) or _global_hooks():
            return None
        parts = []
        for transform, grad in zip(transforms, grads, strict=True):
            if transform is None or grad is None or _kind(transform) != "reshaped":
                return None
            part = _kronecker_part(transform, grad)
            if part is None or not part.like(grads[0]):
                return None
            parts.append(part)
        if len(by_dtype_and_device(grads)) > 1:
            return None
        if select("auto", grads[0].device) != "native":
            return None
        return KroneckerStep(transforms, parts, lr, cache)

    def __init__(
        self, transforms: Sequence[Any], parts: list[KroneckerPart], lr: Rate, cache: GramCache
    ) -> None:
        self.transforms, self.lr, self.parts = list(transforms), lr, parts
        self.linears = [t._modules["transform"] for t in transforms]
        self.own = [linear._parameters for linear in self.linears]
        self.raw = [x for own in self.own for x in own.values()]
        self.options = self._options()
        self.dims = tuple([d for part in parts for d in part.dims])
        self.alpha = (-float(lr),) * len(parts)
        left, right = [part.left for part in parts], [part.right for part in parts]
        psd = [k for k, part in enumerate(parts) if part.psd]
        self.factors = [left[k] for k in psd] + [right[k] for k in psd]
        if psd:
            squares = cache.get(self.factors)
            for k, x, y in zip(psd, squares[: len(psd)], squares[len(psd) :], strict=True):
                left[k], right[k] = x, y
        bias = [part.bias for part in parts]
        with_bias = any([x is not None for x in bias])
        self.present = PARAM | GRAD | LEFT | RIGHT | (BIAS if with_bias else 0)
        self.operands = [*left, *right, *(bias if with_bias else ())]

    def _options(self) -> list[Any]:
        pairs = zip(self.transforms, self.linears, strict=True)
        return [(tuple(t.in_shape), linear.psd, linear.device) for t, linear in pairs]

    def matches(
        self, transforms: Sequence[Any], grads: Sequence[Any], lr: Rate, cache: GramCache
    ) -> bool:
        """Whether the same step would be made anew."""
        if isinstance(lr, Tensor) or lr != self.lr:
            return False
        if self.transforms != transforms or _global_hooks():
            return False
        raw: list[Any] = []
        for transform, linear, own in zip(self.transforms, self.linears, self.own, strict=True):
            if transform._modules["transform"] is not linear or linear._parameters is not own:
                return False
            if _kind(transform) != "reshaped" or _kind(linear) != "kronecker":
                return False
            raw += own.values()
        if list(map(id, raw)) != list(map(id, self.raw)) or self._options() != self.options:
            return False
        if not all([part.like(grad) for part, grad in zip(self.parts, grads, strict=True)]):
            return False
        return not self.factors or cache.holds(self.factors)

    def take(self, params: Sequence[Tensor], grads: Sequence[Any]) -> list[Tensor]:
        """The updated parameters."""
        return list(
            apply(KronForward, self.dims, self.alpha, self.present, *params, *grads, *self.operands)
        )


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
    items, simple = _gather(transforms, grads, None)
    updates = list(grads)
    for i, grad, alpha, scale in simple:
        update = grad if scale is None else scale * grad
        updates[i] = update if alpha == 1.0 else alpha * update
    items.square_factors(None)
    for i, update in zip(items.index, items.run(), strict=True):
        updates[i] = update
    return updates


def updated_parameters(
    transforms: Sequence[nn.Module | None] | None,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    lr: Rate,
    cache: GramCache | None = None,
) -> list[Tensor]:
    """Every parameter after one step, `θ − lr · transform(g)`.

    Args:
        transforms: one module or None per parameter, or None for plain gradients.
        params: θ.
        grads: g, of its parameter's shape; None leaves a parameter as it is.
        lr: a number, a tensor, or a list of tensors, one per parameter, of its shape or a scalar.
        cache: squares of factors to be used again.

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
    if cache is not None and whole:
        if cache.step is None or not cache.step.matches(transforms, grads, lr, cache):
            cache.step = KroneckerStep.of(transforms, grads, lr, cache)
        if cache.step is not None:
            return cache.step.take(params, grads)
    items, simple = _gather(transforms, grads, lr)
    new = list(params)
    for i, grad, alpha, scale in simple:
        new[i] = _scaled_step(params[i], grad, alpha, scale)
    if items.index:
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
    transforms: Sequence[nn.Module | None], grads: Sequence[Tensor | None], lr: Rate
) -> tuple[Items, Simple]:
    """The parameters' items with factors, and those that are a scaled gradient.

    Without a learning rate (None), plain gradients are left out.
    """
    items, first = Items(), Items()
    simple: Simple = []
    hooked = _global_hooks()
    # A rate that is a tensor multiplies element by element, as a scale does.
    tensor_rate = isinstance(lr, Tensor)
    alpha = 1.0 if lr is None else -1.0 if tensor_rate else -lr
    curvature: list[tuple[Any, float, Tensor | None]] = []
    for i, (transform, grad) in enumerate(zip(transforms, grads, strict=True)):
        if grad is None or (transform is None and lr is None):
            continue
        scale = _rate_scale(lr, grad, i) if tensor_rate else None
        if transform is None:
            simple.append((i, grad, alpha, scale))
            continue
        kind = None if hooked else _kind(transform)
        part = _kronecker_part(transform, grad) if kind == "reshaped" else None
        if part is not None:
            items.add(i, part.dims, alpha, grad, part.left, part.right, part.bias, scale, part.psd)
            continue
        own = _own_scale(transform, kind, grad)
        if own is not None:
            _check_like("the transform's scale", own, grad, i)
            factor = transform.lr if kind == "curvature" else 1.0
            simple.append((i, grad, alpha * factor, own if scale is None else scale * own))  # type: ignore[operator]
        elif kind == "curvature" and _is_curvature_of(transform, grad):
            mc: Any = transform._parameters
            t: Any = transform
            if t.dim == 2:
                dims = (1, 1, *grad.shape)
                items.add(i, dims, alpha * t.lr, grad, mc["mc_in"], mc["mc_out"], None, scale)  # type: ignore[arg-type]
            else:  # two matrices on the last axes first, the third on the first axis with the rest
                dims = (1, t.n_in, t.n_out, t.n_f)
                first.add(i, dims, 1.0, grad, mc["mc_out"].t(), mc["mc_f"].t())
                curvature.append((t, alpha * t.lr, scale))
        else:
            simple.append((i, _called(transform, grad, i), alpha, scale))
    for i, (t, factor, scale), grad in zip(first.index, curvature, first.run(), strict=True):
        dims = (1, 1, t.n_in, t.n_out * t.n_f)
        items.add(i, dims, factor, grad, t._parameters["mc_in"], None, None, scale)
    return items, simple


def _own_scale(transform: nn.Module, kind: str | None, grad: Tensor) -> Tensor | None:
    """What a transform that is a scale multiplies by."""
    if kind == "scale":
        own = transform._parameters.get("alpha")
        fits = own is not None and own.dtype == grad.dtype
        return own if fits and (own.shape == grad.shape or own.numel() == 1) else None  # type: ignore[union-attr]
    if kind == "curvature" and transform.dim == 1 and isinstance(transform.lr, (int, float)):
        own = transform._parameters.get("mc")
        return own if own is not None and own.shape == grad.shape else None
    return None


def _is_curvature_of(transform: Any, grad: Tensor) -> bool:
    if not isinstance(transform.lr, (int, float)) or transform.dim != grad.dim():
        return False
    if any([x is None for x in transform._parameters.values()]) or (
        len(transform._parameters) != min(transform.dim, 3)
    ):
        return False  # made a buffer or a plain attribute, say to freeze it
    if transform.dim == 2:
        return True
    return transform.dim > 2 and grad.shape[:2] == (transform.n_in, transform.n_out)


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


class KroneckerPart(NamedTuple):
    """The operands of a `ReshapedTransform(KroneckerLinear)` for one gradient."""

    dims: tuple[int, int, int, int]
    left: Tensor
    right: Tensor
    bias: Tensor | None
    psd: bool

    def like(self, grad: Tensor) -> bool:
        """Whether all operands have a gradient's dtype and device."""
        operands = [x for x in (self.left, self.right, self.bias) if x is not None]
        return all([x.dtype == grad.dtype and x.device == grad.device for x in operands])


def _kronecker_part(reshaped: nn.Module, grad: Tensor) -> KroneckerPart | None:
    """The operands, or None where the module is another one or does more."""
    linear: Any = reshaped._modules["transform"]
    if linear is None or _kind(linear) != "kronecker":
        return None
    factors = linear._parameters
    left, right, bias = factors.get("left"), factors.get("right"), factors.get("bias")
    if left is None or right is None or (bias is None and linear.bias is not None):
        return None  # made a buffer or a plain attribute, say to freeze it
    n, m = left.shape[0], right.shape[0]
    size, shape = n * m, reshaped.in_shape
    if len(shape) != 3 or shape[0] != -1 or shape[1] != n or shape[2] != m:  # type: ignore[arg-type, index]
        return None
    if linear.device is not None and left.device != grad.device:
        return None  # it moves the gradient to a device of its own
    batch = grad.numel() // size if size else math.prod(grad.shape[:-2])
    if batch * size != grad.numel():
        return None
    return KroneckerPart((1, batch, n, m), left, right, bias, linear.psd)


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
