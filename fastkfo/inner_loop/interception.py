"""What a model's forward calls by name and is given another form of, for T tasks at once.

- `F.batch_norm`: on batch statistics written out as a formula, whose derivatives PyTorch gets right
  under vmap to any order, and which leaves running statistics to TaskBuffers; for one task that is
  differentiated once, PyTorch's kernel.
- attention: the math form, since the fused kernels have no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fastkfo.inner_loop.buffers import TaskBuffers
from fastkfo.reference import norm


class Interception(TorchFunctionMode):
    """While it is entered, known functions run in the form that tasks need.

    Args:
        buffers: of the model that runs.
        second_order: whether what runs is differentiated twice.
        replaced: is told what was given another form: function -> form.
    """

    def __init__(self, buffers: TaskBuffers, second_order: bool, replaced: dict[str, str]) -> None:
        super().__init__()
        self.buffers, self.second_order, self.replaced = buffers, second_order, replaced

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or what stands for it."""
        handler = _HANDLERS.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(self, func, args, kwargs or {})


def _attention(mode: Interception, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    query = args[0] if args else kwargs["query"]
    unbatched = is_batchedtensor(query) and query.device.type == "cpu"  # vmap would loop there
    if not mode.second_order and not unbatched:
        return func(*args, **kwargs)
    mode.replaced[f"F.{func.__name__}"] = (
        "the math form: the fused kernels have no second derivative, nor vmap on the CPU"
    )
    with sdpa_kernel(SDPBackend.MATH):
        return func(*args, **kwargs)


def _batch_norm(mode: Interception, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return _batch_norm_call(mode, *args, **kwargs)


def _batch_norm_call(
    mode: Interception,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training and input.numel() == input.shape[1]:
        raise ValueError(
            "batch norm: expected more than one value per channel in training, "
            f"got input size {list(input.shape)}"
        )
    call = _NormCall(mode.buffers, running_mean, running_var, training, momentum, eps)
    tensors = (input, weight, bias)
    batched = any([x is not None and is_batchedtensor(x) for x in tensors])
    if not batched and not mode.second_order and call.fits_kernel(*tensors):
        return call.by_kernel(*tensors)
    mode.replaced["F.batch_norm"] = "a formula per task, right where its own weights are adapted"
    if batched:
        result: Tensor = _TaskBatchNorm.apply(*tensors, call)
        return result
    rows = [None if x is None else x.unsqueeze(0) for x in tensors]
    return call(*rows).squeeze(0)  # type: ignore[arg-type]


class _NormCall:
    """One batch norm with T tasks on the first axis of everything."""

    def __init__(
        self,
        buffers: TaskBuffers,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> None:
        self.buffers, self.mean, self.var = buffers, running_mean, running_var
        self.training, self.momentum, self.eps = training, momentum, eps

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        buffers = self.buffers
        if not self.training:
            mean, var = buffers.own(self.mean), buffers.own(self.var)
            assert mean is not None
            assert var is not None
            return norm.normalise(x, mean, var, weight, bias, self.eps)
        y, mean, var = norm.batch_norm(x, weight, bias, self.eps)
        if self.mean is not None:
            count = x.numel() // mean.numel()
            buffers.record(self.mean, mean, self.momentum)
            buffers.record(self.var, var.detach() * (count / (count - 1)), self.momentum)
        return y

    def fits_kernel(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
        """Whether PyTorch's own kernel does it: on batch statistics, all of one precision."""
        others = [t for t in (weight, bias) if t is not None]
        return (
            self.training
            and x.dtype in (torch.float32, torch.float64)
            and all([t.dtype == x.dtype and t.dim() == 1 for t in others])
        )

    def by_kernel(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """One task, differentiated once: PyTorch's kernel is right then, and faster."""
        mean, var = x.new_zeros(2, x.shape[1])
        y = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=1.0, eps=self.eps)
        if self.mean is not None:  # momentum 1 leaves the statistics of this batch
            self.buffers.record(self.mean, mean.unsqueeze(0), self.momentum)
            self.buffers.record(self.var, var.unsqueeze(0), self.momentum)
        return y


class _TaskBatchNorm(Function):
    """Takes a batch norm out of vmap: plain autograd goes through what `vmap` below does."""

    @staticmethod
    def forward(x: Tensor, weight: Any, bias: Any, call: _NormCall) -> Tensor:
        """Never called: one of the operands is a task's."""
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Any, bias: Any, call: _NormCall) -> Any:
        """The norm of T tasks; what has no task axis is shared."""
        rows = [
            None if t is None else (t.unsqueeze(0) if d is None else t.movedim(d, 0))
            for t, d in zip((x, weight, bias), in_dims[:3], strict=True)
        ]
        if in_dims[0] is None:
            rows[0] = rows[0].expand(info.batch_size, *x.shape)  # type: ignore[union-attr]
        return call(*rows), 0  # type: ignore[arg-type]


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _attention,
}
