"""What a model's forward calls by name and is given another form of, for T tasks at once.

- Convolutions, batch norm, ReLU behind it and pooling: fastkfo's own ops with a task axis, closed
  under differentiation (forms.py). PyTorch's derivatives of a batch norm under vmap are wrong to
  the second order, and running statistics are left to TaskBuffers.
- attention: the math form, since the fused kernels have no second derivative.
- whatever cannot do with images that lie channels last, such as `view`: a copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fastkfo.inner_loop import forms
from fastkfo.inner_loop.buffers import TaskBuffers, Unbatchable
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
        self.norms = Living()  # results of batch norms, which a ReLU may follow
        self.copies = Living()  # what PyTorch would have made views

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or what stands for it."""
        handler = _HANDLERS.get(func)
        if self.copies and _writes(func, args, kwargs) and self.copies.of(args[0]) is not None:
            raise Unbatchable("its forward writes to a view of a layer's result")
        if handler is None:
            return self.plainly(func, args, kwargs or {})
        return handler(self, func, args, kwargs or {})

    def plainly(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call a function; if it wants its images in another layout, on copies."""
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if not any([reason in str(error) for reason in _LAYOUT_ERRORS]):
                raise
        args, kwargs = map_tensors(lambda x: x.contiguous(), (args, kwargs))
        return func(*args, **kwargs)

    def note(self, function: str, form: str) -> None:
        """Remember, for `explain`, what a function was given."""
        self.replaced[function] = form


# What PyTorch says where it cannot do with images that lie channels last, under vmap or at all.
_LAYOUT_ERRORS = ("view size is not compatible", "inside of vmap for memory_format")


class Living:
    """Tensors for as long as they live, and something about each."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Any]] = {}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._known)

    def remember(self, x: Tensor, about: Any) -> None:
        """Know something about x."""
        key = id(x)
        self._known[key] = (weakref.ref(x, lambda _: self._known.pop(key, None)), about)

    def of(self, x: Any) -> Any:
        """What is known about x, or None."""
        found = self._known.get(id(x))
        return found[1] if found is not None and found[0]() is x else None


def _writes(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a function may write to its first argument."""
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    return bool(args) and (in_place or any([x is True for x in args]) or bool(kwargs))


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
    if not forms.mapped(tensors):
        if any([x is not None and is_batchedtensor(x) for x in tensors]):
            raise Unbatchable("a batch norm inside of another transform of torch.func")
        if not mode.second_order and call.fits_kernel(*tensors):
            return call.by_kernel(*tensors)
        mode.note("F.batch_norm", call.form)
        rows = [None if x is None else x.unsqueeze(0) for x in tensors]
        return call.by_formula(*rows).squeeze(0)  # type: ignore[arg-type]
    result = forms.out_of_vmap(call, *tensors)
    mode.note("F.batch_norm", call.form)
    if call.done is not None:
        mode.norms.remember(result, (call, torch.is_grad_enabled()))
    return result


def _relu(mode: Interception, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return _relu_call(mode, func, *args, **kwargs)


def _relu_call(mode: Interception, func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    call, recorded = mode.norms.of(input) or (None, False)
    as_then = recorded is torch.is_grad_enabled()
    if inplace or call is None or not as_then or not call.done.untouched():
        return func(input, True) if inplace else func(input)
    mode.note("F.relu", "differentiated together with the batch norm before it")
    return forms.out_of_vmap(call.rectified, input)


def _layer(form: Any) -> Callable[..., Any]:
    """A handler that tries a form, which may decline by None."""

    def handler(mode: Interception, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        call, tensors = form(*args, **kwargs)
        name = "layer_norm" if func is F.layer_norm else "layers"
        if call is None or not forms.mapped(tensors) or not forms.has_kernels(tensors[0], name):
            return mode.plainly(func, args, kwargs)
        mode.note(f"F.{func.__name__}", forms.described(tensors[0], name, func is F.conv2d))
        return forms.out_of_vmap(call, *tensors)

    return handler


def _mean(mode: Interception, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The mean of pixels as a sum: a mean's own derivative writes every pixel twice."""
    x, *rest = args or (kwargs.get("input"),)
    axes = rest[0] if rest else kwargs.get("dim")
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        return func(*args, **kwargs)
    pixels = x.dim() == 4 and isinstance(axes, (list, tuple)) and sorted(axes) in _PIXELS
    if not pixels or set(kwargs) - {"dim", "keepdim", "input"} or len(rest) > 2:
        return func(*args, **kwargs)
    keepdim = rest[1] if len(rest) > 1 else kwargs.get("keepdim", False)
    return x.sum(axes, keepdim) / (x.shape[2] * x.shape[3])


_PIXELS = ([2, 3], [-2, -1], [-1, 2], [-2, 3])  # of [N, C, H, W]


def _adaptive(mode: Interception, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    x, size = args if len(args) == 2 and not kwargs else (None, None)
    one = size == 1 or (isinstance(size, (list, tuple)) and set(size) == {1})
    if not one or not isinstance(x, Tensor) or x.dim() != 4:
        return func(*args, **kwargs)
    return _mean(mode, torch.mean, (x, (2, 3), True), {})


def _view(mode: Interception, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What would be a view, had PyTorch's own layers returned the images."""
    result = mode.plainly(func, args, kwargs)
    x = args[0] if args else None
    if isinstance(x, Tensor) and not x.is_contiguous() and isinstance(result, Tensor):
        mode.copies.remember(result, True)
    return result


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    F.conv2d: _layer(forms.conv2d),
    F.linear: _layer(forms.linear),
    F.layer_norm: _layer(forms.layer_norm),
    F.adaptive_avg_pool2d: _adaptive,
    F.max_pool2d: _layer(forms.max_pool2d),
    F.avg_pool2d: _layer(forms.avg_pool2d),
    Tensor.view: _view,
    Tensor.flatten: _view,
    torch.flatten: _view,
    Tensor.reshape: _view,
    torch.reshape: _view,
    Tensor.mean: _mean,
    torch.mean: _mean,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _attention,
}
"""Functions that are given another form while a model runs."""
