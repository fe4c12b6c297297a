"""Triton kernels for batches of tasks: layers, the Kronecker update. Raw ops, no autograd.

Convolution, batch norm and pooling were tested on an H200; all are under Triton's interpreter, and
are compiled ahead of time for Ampere, Hopper and AMD's gfx942. T is the number of tasks. Layers are
channels-last and contiguous: images `[T, N, H, W, C]`, convolution weights
`[T, O, C/groups, kh, kw]`; operands of the Kronecker update may have any strides. float32, float16
and bfloat16 are accumulated in float32, float64 in float64; every op is deterministic.

Importing this package does not import Triton; using an op does.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from typing import Any

_MODULES = {
    "conv2d": "conv",
    "conv2d_input": "conv",
    "conv2d_weight": "conv",
    "batch_norm": "norm",
    "batch_norm_backward": "norm",
    "batch_norm_double_backward": "norm",
    "kron_forward": "kron",
    "kron_backward": "kron",
    "kron_double_backward": "kron",
    "gram": "gram_products",
    "gram_vjp": "gram_products",
    "gram_jvp": "gram_products",
    "max_pool2d": "pool",
    "max_pool2d_scatter": "pool",
    "max_pool2d_gather": "pool",
    "avg_pool2d": "pool",
    "avg_pool2d_backward": "pool",
}

__all__ = ["available", "why_unavailable"]  # and the ops, which __getattr__ finds


def available() -> bool:
    """Whether Triton can be imported; nothing is imported to find out."""
    return importlib.util.find_spec("triton") is not None


def why_unavailable(device_type: str) -> str | None:
    """Why the ops cannot run on a kind of device, or None if they can."""
    if not available():
        return "triton is not installed"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton's kernels run on cuda (or under TRITON_INTERPRET=1), not on {device_type}"
    if os.environ.get("CC") is None and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "Triton needs a C compiler when it first launches a kernel: none was found"
    return None


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    op = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = op  # the next look-up does not come here
    return op
