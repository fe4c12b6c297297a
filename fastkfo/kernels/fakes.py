"""Shapes and dtypes of what the native ops return, for tracing without data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

GRAD, LEFT, RIGHT, BIAS, SCALE, COTANGENT = 1, 2, 4, 8, 16, 32

_BATCH_NORM = 8  # its number in csrc/inner_loop/plan.h

_negative: torch.library.Library | None = None  # its kernels last as long as it does


def register() -> None:
    """Register the fakes; once, after the library is loaded."""
    global _negative
    if _negative is None:
        _negative = torch.library.Library("fastkfo", "IMPL")
        for name in ("kron_forward", "kron_backward", "kron_double_backward"):
            torch.library.register_fake(f"fastkfo::{name}", globals()[f"_{name}"])
            _negative.impl(name, partial(_without_negative_views, name), "Negative")
        for name in (
            "gram", "gram_vjp", "gram_jvp", "cross_entropy", "cross_entropy_double_backward",
            "conv2d", "conv2d_input", "conv2d_weight",
            "batch_norm", "batch_norm_backward", "batch_norm_double_backward",
            "layer_norm", "layer_norm_backward", "layer_norm_double_backward",
            "max_pool2d", "max_pool2d_scatter", "max_pool2d_gather",
            "avg_pool2d", "avg_pool2d_backward",
            "inner_loop_forward", "inner_loop_gradient", "inner_loop_backward",
        ):  # fmt: skip
            torch.library.register_fake(f"fastkfo::{name}", globals()[f"_{name}"])


def _without_negative_views(name: str, *args: Any) -> list[Tensor]:
    """Call an op without lazily negated tensors (`z.conj().imag` is one)."""
    # PyTorch's own fallback looks into lists of tensors, but not into those with gaps.
    resolved = [
        [x.resolve_neg() if isinstance(x, Tensor) else x for x in arg]
        if isinstance(arg, (list, tuple))
        else arg
        for arg in args
    ]
    return getattr(torch.ops.fastkfo, name).default(*resolved)


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(like.shape)


def _kron_forward(grads, left, right, bias, scale, params, dims, alpha, tf32=False):  # type: ignore[no-untyped-def]
    return [_empty(grad) for grad in grads]


def _wanted(
    wanted: Sequence[int], groups: Sequence[tuple[int, Sequence[Tensor | None]]]
) -> list[Tensor]:
    return [
        _empty(group[i])  # type: ignore[arg-type]
        for i, bits in enumerate(wanted)
        for bit, group in groups
        if bits & bit
    ]


def _kron_backward(cotangents, grads, left, right, bias, scale, dims, alpha, wanted, tf32=False):  # type: ignore[no-untyped-def]
    groups = ((GRAD, grads), (LEFT, left), (RIGHT, right), (BIAS, bias), (SCALE, scale))
    return _wanted(wanted, groups)


def _kron_double_backward(  # type: ignore[no-untyped-def]
    cotangents, grads, left, right, bias, scale,
    d_grads, d_left, d_right, d_bias, d_scale, dims, alpha, wanted, tf32=False,
):  # fmt: skip
    groups = ((GRAD, grads), (LEFT, left), (RIGHT, right), (BIAS, bias), (SCALE, scale))
    return _wanted(wanted, (*groups, (COTANGENT, cotangents)))


def _square(factor: Tensor) -> Tensor:
    return factor.new_empty((*factor.shape[:-2], factor.shape[-1], factor.shape[-1]))


def _gram(factors, tf32=False):  # type: ignore[no-untyped-def]
    return [_square(factor) for factor in factors]


def _gram_vjp(factors, cotangents, tf32=False):  # type: ignore[no-untyped-def]
    return [_empty(factor) for factor in factors]


def _gram_jvp(factors, tangents, tf32=False):  # type: ignore[no-untyped-def]
    return [_square(factor) for factor in factors]


def _cross_entropy(logits, labels):  # type: ignore[no-untyped-def]
    full = logits.new_empty(logits.shape)
    return logits.new_empty(logits.shape[:1]), full, torch.empty_like(full)


def _cross_entropy_double_backward(v, cotangent, p, residual):  # type: ignore[no-untyped-def]
    return p.new_empty(p.shape[:1]), p.new_empty(p.shape)


def _conv2d(x, weight, bias, x2, weight2, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            x.shape[2:4], weight.shape[3:], stride, padding, dilation, strict=True
        )
    ]
    return x.new_empty(*x.shape[:2], *sizes, weight.shape[1])


def _conv2d_input(dy, weight, size, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    return dy.new_empty(*dy.shape[:2], *size, weight.shape[2] * groups)


def _conv2d_weight(x, dy, kernel, stride, padding, dilation, groups, bias):  # type: ignore[no-untyped-def]
    tasks, outputs = x.shape[0], dy.shape[4]
    dw = x.new_empty(tasks, outputs, x.shape[4] // groups, *kernel)
    return dw, x.new_empty(tasks if bias else 0, outputs)


def _channels(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2])


def _batch_norm(x, weight, bias, eps, relu):  # type: ignore[no-untyped-def]
    return _empty(x), _channels(x), _channels(x)


def _batch_norm_backward(dy, x, mean, rstd, weight, bias, relu):  # type: ignore[no-untyped-def]
    return _empty(x), _channels(x), _channels(x)


def _batch_norm_double_backward(a, b, c, dy, x, mean, rstd, weight, bias, relu):  # type: ignore[no-untyped-def]
    return _empty(x), _empty(x), _channels(x)


def _layer_norm(x, weight, bias, eps):  # type: ignore[no-untyped-def]
    return _empty(x), x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])


def _layer_norm_backward(dy, x, mean, rstd, weight):  # type: ignore[no-untyped-def]
    return _empty(x), _channels(x), _channels(x)


def _layer_norm_double_backward(a, b, c, dy, x, mean, rstd, weight):  # type: ignore[no-untyped-def]
    return _empty(x), _empty(x), _channels(x)


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:2], *size, x.shape[4])


def _max_pool2d(x, kernel, stride, padding, dilation, size):  # type: ignore[no-untyped-def]
    return _resized(x, size), _resized(x, size).to(torch.int32)


def _max_pool2d_scatter(dy, where, size, kernel, stride, padding, dilation):  # type: ignore[no-untyped-def]
    return _resized(dy, size)


def _max_pool2d_gather(v, where):  # type: ignore[no-untyped-def]
    return _resized(v, where.shape[2:4])


def _avg_pool2d(x, kernel, stride, padding, size, include_pad, divisor):  # type: ignore[no-untyped-def]
    return _resized(x, size)


def _avg_pool2d_backward(dy, size, kernel, stride, padding, include_pad, divisor):  # type: ignore[no-untyped-def]
    return _resized(dy, size)


def _inner_loop_forward(  # type: ignore[no-untyped-def]
    theta, left, right, bias, scale, x_s, y_s, x_q, y_q, tape, layers, constants, alpha, steps,
    loss, query_loss, forms, psd, adapt, adapted,
):  # fmt: skip
    tasks, classes = x_s.shape[0], layers[-3]
    batch_norm = 8  # its number in csrc/inner_loop/plan.h
    statistics = sum(
        [2 * layers[k + 1] for k in range(0, len(layers), 5) if layers[k] == batch_norm]
    )
    asked = x_q is not None and y_q is not None
    outputs = [
        x_s.new_empty(tasks if asked else 0),
        x_s.new_empty(tasks, steps),
        x_s.new_empty(0, 0, classes) if x_q is None else x_s.new_empty(*x_q.shape[:2], classes),
        x_s.new_empty(tasks, steps + (x_q is not None), statistics),
        x_s.new_empty(tasks, dtype=torch.bool),
    ]
    if adapted:
        matrices = {layers[k + 3] for k in range(0, len(layers), 5) if layers[k] == 0}
        ranks = [2 if i in matrices else 1 for i in range(len(theta))]
        outputs += [x_s.new_empty(tasks, *p.shape[-r:]) for p, r in zip(theta, ranks, strict=True)]
    return outputs


def _inner_loop_backward(  # type: ignore[no-untyped-def]
    d_loss, d_adapted, theta, left, right, bias, scale, x_s, y_s, x_q, y_q, tape, layers,
    constants, alpha, steps, loss, query_loss, forms, psd, adapt, first_order, wanted, want_x_s,
    want_x_q,
):  # fmt: skip
    outputs = [
        _empty(group[i])
        for i, mask in enumerate(wanted)
        for bit, group in enumerate((theta, left, right, bias, scale))
        if mask & (1 << bit)
    ]
    return outputs + [_empty(x) for x, w in ((x_s, want_x_s), (x_q, want_x_q)) if w]


def _inner_loop_gradient(  # type: ignore[no-untyped-def]
    theta, left, right, bias, scale, x_s, y_s, x_q, y_q, layers, constants, alpha, steps, loss,
    query_loss, forms, psd, adapt, first_order, wanted, want_x_s, want_x_q,
):  # fmt: skip
    operands = (theta, left, right, bias, scale, x_s, y_s, x_q, y_q)
    rest = (layers, constants, alpha, steps, loss, query_loss, forms, psd, adapt)
    options = (first_order, wanted, want_x_s, want_x_q)
    return [
        *_inner_loop_forward(*operands, None, *rest, False),
        *_inner_loop_backward(None, [], *operands, None, *rest, *options),
    ]
