"""Tells which transform modules are exactly known, so that their formula may be fused.

Known are this package's and learn2learn's own classes, without hooks and with their own `forward`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as module_globals

_KNOWN = {
    "optim.transforms.module_transform.ReshapedTransform": "reshaped",
    "optim.transforms.metacurvature_transform.MetaCurvatureTransform": "curvature",
    "nn.kroneckers.KroneckerLinear": "kronecker",
    "nn.misc.Scale": "scale",
}
_kinds: dict[type, str | None] = {}


def kind_of(module: nn.Module) -> str | None:
    """What a module exactly is, or None if its `forward` has to be called."""
    cls = type(module)
    if cls not in _kinds:
        package, _, rest = f"{cls.__module__}.{cls.__qualname__}".partition(".")
        _kinds[cls] = _KNOWN.get(rest) if package in ("fastkfo", "learn2learn") else None
    kind = _kinds[cls]
    if kind is None or not is_plain(module):
        return None
    return kind


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module) -> bool:
    """Whether a module's own class says all of what calling it does."""
    state = module.__dict__
    return "forward" not in state and not any([state[name] for name in HOOKS])


def global_hooks() -> bool:
    """Whether hooks are registered for all modules."""
    return bool(
        module_globals._global_forward_hooks
        or module_globals._global_forward_pre_hooks
        or module_globals._global_backward_hooks
        or module_globals._global_backward_pre_hooks
    )


def own_scale(transform: nn.Module, kind: str | None, grad: Tensor) -> Tensor | None:
    """What a transform that is a scale multiplies by."""
    if kind == "scale":
        own = transform._parameters.get("alpha")
        if own is None or own.dtype != grad.dtype:
            return None
        if own.shape == grad.shape:
            return own
        return own.reshape(()) if own.numel() == 1 and own.dim() <= max(1, grad.dim()) else None
    if kind == "curvature" and transform.dim == 1 and isinstance(transform.lr, (int, float)):
        own = transform._parameters.get("mc")
        return own if own is not None and own.shape == grad.shape else None
    return None


def is_curvature_of(transform: Any, grad: Tensor) -> bool:
    """Whether a `MetaCurvatureTransform` was made for gradients of two axes or more like this."""
    if not isinstance(transform.lr, (int, float)) or transform.dim != grad.dim():
        return False
    if any([x is None for x in transform._parameters.values()]) or (
        len(transform._parameters) != min(transform.dim, 3)
    ):
        return False  # made a buffer or a plain attribute, say to freeze it
    if transform.dim == 2:
        return True
    return transform.dim > 2 and grad.shape[:2] == (transform.n_in, transform.n_out)


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


def kronecker_part(
    reshaped: nn.Module, grad: Tensor, tasks: int | None = None
) -> KroneckerPart | None:
    """The operands, or None where the module is another one or does more.

    Args:
        reshaped: the transform.
        grad: the gradient. A leading axis of tasks that share the factors is part of the batch.
        tasks: T, if the factors, too, have a leading axis of tasks.

    Returns:
        The operands.
    """
    linear: Any = reshaped._modules["transform"]
    if linear is None or kind_of(linear) != "kronecker":
        return None
    factors = linear._parameters
    left, right, bias = factors.get("left"), factors.get("right"), factors.get("bias")
    if left is None or right is None or (bias is None and linear.bias is not None):
        return None  # made a buffer or a plain attribute, say to freeze it
    n, m = left.shape[-1], right.shape[-1]
    size, shape = n * m * (tasks or 1), reshaped.in_shape
    if len(shape) != 3 or shape[0] != -1 or shape[1] != n or shape[2] != m:  # type: ignore[arg-type, index]
        return None
    if linear.device is not None and left.device != grad.device:
        return None  # it moves the gradient to a device of its own
    batch = grad.numel() // size if size else math.prod(grad.shape[:-2])
    if batch * size != grad.numel():
        return None
    return KroneckerPart((tasks or 1, batch, n, m), left, right, bias, linear.psd)
