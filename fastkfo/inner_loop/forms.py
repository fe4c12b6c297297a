"""The forms that layers have for T tasks: fastkfo's ops, called from inside of vmap.

A form is a function of tensors `[T, ...]`; one without a task axis is shared, and lacks it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    _add_batch_dim,
    get_unwrapped,
    is_batchedtensor,
    maybe_get_bdim,
    maybe_get_level,
)
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

from fastkfo.functional import checks, conv, norm, pool
from fastkfo.functional.layer_norm import layer_norm_unchecked
from fastkfo.functional.linear import linear_unchecked
from fastkfo.inner_loop.buffers import TaskBuffers
from fastkfo.kernels import layers, selector
from fastkfo.reference import norm as reference

Form = Callable[..., Tensor]
Declined = tuple[None, tuple[Tensor, ...]]
_KINDS = (torch.float32, torch.float64, *layers.LOW)


def has_kernels(x: Tensor, op: str = "layers") -> bool:
    """Whether layers of this tensor run on kernels of fastkfo's."""
    return x.dtype in _KINDS and selector.select("auto", x.device, op) != "reference"


def mapped(tensors: Sequence[Tensor | None]) -> bool:
    """Whether vmap, and no other transform inside of it, maps some of the tensors."""
    if not any([x is not None and is_batchedtensor(x) for x in tensors]):
        return False
    return retrieve_current_functorch_interpreter().key() == TransformType.Vmap


def described(x: Tensor, op: str = "layers", narrowed: bool = False) -> str:
    """In words, what a layer of this tensor runs on; `narrowed`: whether autocast applies to it."""
    chosen = selector.select("auto", x.device, op)
    dtype = (_autocast([x])[0] if narrowed else x).dtype  # type: ignore[union-attr]
    wide = ", in float32" if dtype in layers.LOW and chosen == "native" else ""
    return f"one {chosen} call for all tasks{wide}"


def out_of_vmap(form: Form, *tensors: Tensor | None) -> Tensor:
    """Call a form inside of vmap, on what is being mapped; plain autograd goes through it.

    An autograd Function with a vmap rule does the same, in 100 microseconds more.

    Args:
        form: of tensors with T tasks in front. The first operand always has them.
        tensors: as they are inside of vmap; at least one is mapped.

    Returns:
        The result, mapped again.
    """
    interpreter: Any = retrieve_current_functorch_interpreter()
    level, size = interpreter.level(), interpreter.batch_size()
    rows = [None if t is None else _unmapped(t, level) for t in tensors]
    first = rows[0]
    assert first is not None
    if len(first) != size:
        rows[0] = first.expand(size, *first.shape[1:])
    with interpreter.lower():
        return _add_batch_dim(form(*rows), 0, level)


def _unmapped(x: Tensor, level: int) -> Tensor:
    """With the mapped axis in front; an axis of one where there is none."""
    if not is_batchedtensor(x) or maybe_get_level(x) != level:
        return x.unsqueeze(0)
    value, dim = get_unwrapped(x), maybe_get_bdim(x)
    return value if dim == 0 else value.movedim(dim, 0)


def _autocast(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What autocast makes of a convolution's operands; float64 is left alone, as there."""
    device = next(t for t in tensors if t is not None).device
    if not checks.autocast_enabled(device):
        return list(tensors)
    kind = torch.get_autocast_dtype(device.type)
    return [t if t is None or t.dtype == torch.float64 else t.to(kind) for t in tensors]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Form, tuple[Tensor | None, ...]] | Declined:
    """F.conv2d's form, unless its padding is a word, or its images are not `[N, C, H, W]`."""
    if isinstance(padding, str) and padding != "valid":
        return None, (input,)
    if input.dim() != 4 or weight.dim() != 4:
        return None, (input,)
    if groups != 1:  # PyTorch's kernels were as fast or faster, depthwise ten times
        return None, (input,)
    pad = 0 if isinstance(padding, str) else padding
    options = {"stride": stride, "padding": pad, "dilation": dilation}
    return partial(_conv2d, options), (input, weight, bias)


def _conv2d(options: dict[str, Any], *tensors: Tensor | None) -> Tensor:
    x, weight, bias = _autocast(tensors)
    assert x is not None
    assert weight is not None
    tasks = x.shape[0]
    bias_rows = 1 if bias is None else bias.shape[0]
    if len(weight) == 1 and bias_rows == 1:  # shared: all samples are one task's
        y = conv.conv2d(x.flatten(0, 1).unsqueeze(0), weight, bias, **options)
        return y.squeeze(0).unflatten(0, (tasks, -1))
    weight = weight.expand(tasks, *weight.shape[1:])
    bias = None if bias is None else bias.expand(tasks, -1)
    return conv.conv2d(x, weight, bias, **options)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Form, tuple[Tensor | None, ...]] | Declined:
    """F.linear's form, unless a task has a single row."""
    if input.dim() < 2 or weight.dim() != 2:
        return None, (input,)
    return _linear, (input, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias_rows = 1 if bias is None else bias.shape[0]
    if len(weight) == 1 and bias_rows == 1:
        return F.linear(x, weight[0], None if bias is None else bias[0])
    weight = weight.expand(len(x), *weight.shape[1:])
    return linear_unchecked(x, weight, None if bias is None else bias.expand(len(x), -1))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Form, tuple[Tensor | None, ...]] | Declined:
    """F.layer_norm's form, if all is of one precision."""
    others = [t for t in (weight, bias) if t is not None]
    rank = len(normalized_shape)
    fits = tuple(normalized_shape) == tuple(input.shape[input.dim() - rank :])
    if any([t.dtype != input.dtype for t in others]) or input.dim() <= rank or not fits:
        return None, (input,)

    def form(x: Tensor, *affine: Tensor | None) -> Tensor:
        weight, bias = [None if t is None else t.flatten(1).expand(len(x), -1) for t in affine]
        y = layer_norm_unchecked(x.flatten(-rank), weight, bias, eps)
        return y.reshape(x.shape)

    return form, (input, weight, bias)


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Form, tuple[Tensor, ...]] | Declined:
    """F.max_pool2d's form, unless it is asked for indices or its images are not `[N, C, H, W]`."""
    if return_indices or input.dim() != 4:
        return None, (input,)

    def form(x: Tensor) -> Tensor:
        steps = stride or None  # nn.functional takes [] for none
        return pool.max_pool2d(x, kernel_size, steps, padding, dilation, ceil_mode=ceil_mode)

    return form, (input,)


def avg_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> tuple[Form, tuple[Tensor, ...]] | Declined:
    """F.avg_pool2d's form, unless its images are not `[N, C, H, W]`."""
    if input.dim() != 4:
        return None, (input,)

    def form(x: Tensor) -> Tensor:
        return pool.avg_pool2d(
            x, kernel_size, stride or None, padding, ceil_mode=ceil_mode,
            count_include_pad=count_include_pad, divisor_override=divisor_override,
        )  # fmt: skip

    return form, (input,)


class NormCall:
    """One batch norm with T tasks on the first axis of everything.

    Args:
        buffers: take up its running statistics.
        running_mean: as F.batch_norm has it.
        running_var: likewise.
        training: likewise.
        momentum: likewise.
        eps: likewise.
    """

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
        self.done: norm.Normed | None = None  # what a ReLU behind it needs
        self.form = "a formula per task, right where its own weights are adapted"

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The norm of `[T, N, C, ...]`, and its statistics to the buffers."""
        if not self.training:
            mean, var = self.buffers.own(self.mean), self.buffers.own(self.var)
            assert mean is not None
            assert var is not None
            return reference.normalise(x, mean, var, weight, bias, self.eps)
        if has_kernels(x) and norm.takes(x, weight, bias):
            self.form = described(x)
            self.done = norm.Normed(x, weight, bias, self.eps)
            y, mean, var = self.done.result
            self._record(mean, var, x)
            return y
        return self.by_formula(x, weight, bias)

    def by_formula(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The same in plain PyTorch."""
        if not self.training:
            return self(x, weight, bias)
        y, mean, var = reference.batch_norm(x, weight, bias, self.eps)
        self._record(mean, var, x)
        return y

    def rectified(self, y: Tensor) -> Tensor:
        """ReLU of what the call has returned, differentiated with it."""
        assert self.done is not None
        return self.done.rectified()

    def _record(self, mean: Tensor, var: Tensor, x: Tensor) -> None:
        if self.mean is not None:
            count = x.numel() // mean.numel()
            self.buffers.record(self.mean, mean, self.momentum)
            self.buffers.record(self.var, var.detach() * (count / (count - 1)), self.momentum)

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
