"""What a model's forward calls by name and is given another form of, for T tasks at once.

- Convolutions, batch norm, ReLU behind it and pooling: fastkfo's own ops with a task axis, closed
  under differentiation (forms.py). PyTorch's derivatives of a batch norm under vmap are wrong to
  the second order, and running statistics are left to TaskBuffers.
- attention: the math form, since the fused kernels have no second derivative.
- whatever cannot do with images that lie channels last, such as `view`: a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fastkfo.inner_loop import forms
from fastkfo.inner_loop.buffers import TaskBuffers
from fastkfo.inner_loop.trees import map_tensors


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
        self.norms = forms.Norms()  # whose results a ReLU may follow

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or what stands for it."""
        handler = _HANDLERS.get(func)
        if handler is None:
            return _with_gaps(func, args, kwargs or {})
        return handler(self, func, args, kwargs or {})

    def note(self, function: str, form: str) -> None:
        """Remember, for `explain`, what a function was given."""
        self.replaced[function] = form


def _attention(mode: Interception, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    query = args[0] if args else kwargs["query"]
    unbatched = is_batchedtensor(query) and query.device.type == "cpu"  # vmap would loop there
    if not mode.second_order and not unbatched:
        return func(*args, **kwargs)
    form = "the math form: the fused kernels have no second derivative, nor vmap on the CPU"
    mode.note(f"F.{func.__name__}", form)
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
    call = forms.NormCall(mode.buffers, running_mean, running_var, training, momentum, eps)
    tensors = (input, weight, bias)
    batched = any([x is not None and is_batchedtensor(x) for x in tensors])
    if not batched and not mode.second_order and call.fits_kernel(*tensors):
        return call.by_kernel(*tensors)
    result: Tensor
    if batched:
        result = forms.out_of_vmap(call, *tensors)
    else:
        rows = [None if x is None else x.unsqueeze(0) for x in tensors]
        result = call(*rows).squeeze(0)  # type: ignore[arg-type]
    mode.note("F.batch_norm", call.form)
    mode.norms.remember(result, call)
    return result


def _relu(mode: Interception, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return _relu_call(mode, func, *args, **kwargs)


def _relu_call(mode: Interception, func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    call = None if inplace else mode.norms.of(input)
    if call is None:
        return func(input, True) if inplace else func(input)
    mode.note("F.relu", "differentiated together with the batch norm before it")
    if is_batchedtensor(input):
        return forms.out_of_vmap(call.rectified, input)
    return call.rectified(input).squeeze(0)


def _layer(form: Any, alone: bool = True) -> Callable[..., Any]:
    """A handler that tries a form, which may decline by None.

    Args:
        form: of forms.py.
        alone: whether it is also for one task by itself, where that is differentiated twice.

    Returns:
        The handler.
    """

    def handler(mode: Interception, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        call, tensors = form(*args, **kwargs)
        batched = any([x is not None and is_batchedtensor(x) for x in tensors])
        wanted = batched or (alone and mode.second_order)
        if call is None or not wanted or not forms.has_kernels(tensors[0]):
            return _with_gaps(func, args, kwargs)
        mode.note(f"F.{func.__name__}", forms.described(tensors[0], func is F.conv2d))
        if batched:
            return forms.out_of_vmap(call, *tensors)
        return call(*[None if x is None else x.unsqueeze(0) for x in tensors]).squeeze(0)

    return handler


def _mean(mode: Interception, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return _mean_call(func, *args, **kwargs)


def _mean_call(func: Any, input: Tensor, dim: Any = None, keepdim: bool = False, **kw: Any) -> Any:
    """The mean of pixels as a sum: a mean's own derivative writes every pixel twice."""
    axes = dim if isinstance(dim, (list, tuple)) else ()
    pixels = input.dim() == 4 and sorted(d % 4 for d in axes) == [2, 3]
    if kw or not pixels or input.dtype not in (torch.float32, torch.float64):
        return func(input, dim, keepdim, **kw) if dim is not None else func(input, **kw)
    return input.sum(dim, keepdim) / (input.shape[2] * input.shape[3])


def _adaptive(mode: Interception, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return _adaptive_call(func, *args, **kwargs)


def _adaptive_call(func: Any, input: Tensor, output_size: Any) -> Any:
    one = output_size == 1 or (isinstance(output_size, (list, tuple)) and set(output_size) == {1})
    if not one or input.dim() != 4:
        return func(input, output_size)
    return _mean_call(torch.mean, input, (2, 3), True)


# What PyTorch says where it cannot do with images that lie channels last, under vmap or at all.
_LAYOUT_ERRORS = ("view size is not compatible", "inside of vmap for memory_format")


def _with_gaps(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call a function; if it wants its images in another layout, on copies."""
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        if not any([reason in str(error) for reason in _LAYOUT_ERRORS]):
            raise
    args, kwargs = map_tensors(lambda x: x.contiguous(), (args, kwargs))
    return func(*args, **kwargs)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    F.conv2d: _layer(forms.conv2d),
    F.linear: _layer(forms.linear, alone=False),
    F.layer_norm: _layer(forms.layer_norm),
    F.adaptive_avg_pool2d: _adaptive,
    F.max_pool2d: _layer(forms.max_pool2d),
    F.avg_pool2d: _layer(forms.avg_pool2d),
    Tensor.mean: _mean,
    torch.mean: _mean,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _attention,
}
"""Functions that are given another form while a model runs."""
