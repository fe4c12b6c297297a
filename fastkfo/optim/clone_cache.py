"""What stays the same from step to step of a clone, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkfo.functional.checks import by_dtype_and_device
from fastkfo.functional.function import apply
from fastkfo.functional.gram import gram_unchecked
from fastkfo.functional.kron_autograd import KronForward
from fastkfo.functional.kron_layout import BIAS, GRAD, LEFT, PARAM, RIGHT
from fastkfo.kernels.kron import for_blas
from fastkfo.kernels.selector import select
from fastkfo.optim.recognise import HOOKS, KroneckerPart, global_hooks, kind_of, kronecker_part


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
        # A custom Function has the first, a product of PyTorch the second; freed, either raises.
        for saved in ("saved_tensors", "_saved_self"):
            try:
                return getattr(node, saved) is not None
            except AttributeError:
                continue
            except RuntimeError:
                return False
        return False


class KroneckerStep:
    """The step of a clone whose transforms are all Kronecker, ready to be taken again.

    Between the steps of a clone only θ and its gradient change. `matches` makes sure of that, at a
    fraction of what gathering the operands costs.
    """

    @staticmethod
    def of(
        transforms: Sequence[Any], grads: Sequence[Any], lr: Any, cache: GramCache
    ) -> KroneckerStep | None:
        """The step, or None where it is not Kronecker alone, or not one native call."""
        if not transforms or isinstance(lr, (Tensor, list, tuple)) or global_hooks():
            return None
        parts = []
        for transform, grad in zip(transforms, grads, strict=True):
            if transform is None or grad is None or kind_of(transform) != "reshaped":
                return None
            part = kronecker_part(transform, grad)
            if part is None or not part.like(grads[0]):
                return None
            parts.append(part)
        if len(by_dtype_and_device(grads)) > 1:
            return None
        if select("auto", grads[0].device, "kron") != "native":
            return None
        if grads[0].device.type != "cpu" and any([for_blas(*part.dims, True) for part in parts]):
            return None
        return KroneckerStep(transforms, grads, parts, lr, cache)

    def __init__(
        self,
        transforms: Sequence[Any],
        grads: Sequence[Any],
        parts: list[KroneckerPart],
        lr: Any,
        cache: GramCache,
    ) -> None:
        self.transforms, self.lr = list(transforms), lr
        self.linears = [t._modules["transform"] for t in transforms]
        self.own = [linear._parameters for linear in self.linears]
        modules = [*transforms, *self.linears]
        states = [vars(module) for module in modules]
        self.modules, self.types = modules, list(map(type, modules))
        self.hooks = [state[name] for state in states for name in HOOKS]
        self.states = states
        self.facts = self._facts(grads)
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

    def _facts(self, grads: Sequence[Any]) -> list[Any]:
        """Everything that the operands depend on and that may change."""
        raw = [x for own in self.own for x in own.values()]
        facts: list[Any] = [*map(id, raw), *[x.dtype for x in raw if x is not None]]
        for transform, linear, grad in zip(self.transforms, self.linears, grads, strict=True):
            facts += (transform.in_shape, linear.psd, linear.device, grad.dtype, grad.device)
        return facts

    def matches(
        self, transforms: Sequence[Any], grads: Sequence[Any], lr: Any, cache: GramCache
    ) -> bool:
        """Whether the same step would be made anew."""
        if isinstance(lr, Tensor) or lr != self.lr or self.transforms != transforms:
            return False
        if any(self.hooks) or global_hooks() or any(["forward" in s for s in self.states]):
            return False
        if list(map(type, self.modules)) != self.types:  # a parametrization changes the class
            return False
        for transform, linear, own in zip(self.transforms, self.linears, self.own, strict=True):
            if transform._modules["transform"] is not linear or linear._parameters is not own:
                return False
        if self._facts(grads) != self.facts:
            return False
        return not self.factors or cache.holds(self.factors)

    def take(self, params: Sequence[Tensor], grads: Sequence[Any]) -> list[Tensor]:
        """The updated parameters."""
        call = (self.dims, self.alpha, self.present, "native")
        return list(apply(KronForward, *call, *params, *grads, *self.operands))
