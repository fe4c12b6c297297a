"""What Triton's Kronecker ops refuse, and which switch says how exact their products are."""

import importlib

import pytest
import torch

from tests.triton_ops import MARKS, OURS, ops

__all__ = ["ops"]  # a fixture

pytestmark = MARKS
BIAS = 8


def gone(*shape):
    """A tensor whose memory was taken away."""
    x = torch.ones(*shape)
    x.untyped_storage().resize_(0)
    return x


WRONG = {
    "dims": ({"dims": [2, 2, 3]}, ValueError, "dims: expected 4 for each of 1 items, got 3"),
    "dims_negative": ({"dims": [2, 2, -3, -5]}, ValueError, "dims: expected sizes of item 0"),
    "dims_larger": ({"dims": [2, 2, 3, 6]}, ValueError, r"grads\[0\]: expected 72 or 36 elements"),
    "alpha": ({"alpha": []}, ValueError, "alpha: expected 1 for each of 1 items, got 0"),
    "wanted": ({"wanted": [1, 1]}, ValueError, "wanted: expected 1 for each of 1 items, got 2"),
    "bits": ({"wanted": [64]}, ValueError, r"wanted\[0\]: expected bits among"),
    "absent": ({"bias": [], "wanted": [BIAS]}, ValueError, r"wanted\[0\]: .* there, got bias"),
    "length": ({"left": [None, None]}, ValueError, "left: expected 1 operands, got 2"),
    "dtype": ({"left": [torch.ones(3, 3).double()]}, TypeError, r"left\[0\]: expected dtype"),
    "int": ({"grads": [torch.ones(2, 2, 3, 5).int()]}, TypeError, r"grads\[0\]: expected a dtype"),
    "device": ({"left": [torch.ones(3, 3, device="meta")]}, ValueError, "expected device"),
    "memory": ({"left": [gone(3, 3)]}, ValueError, r"left\[0\]: expected a tensor with memory"),
    "left": ({"left": [torch.ones(3, 4)]}, ValueError, r"left\[0\]: expected 18 or 9 elements"),
    "shared": ({"grads": [torch.ones(3, 5)]}, ValueError, r"grads\[0\]: expected 60 elements"),
    "cotangent": ({"cotangents": [torch.ones(1)]}, ValueError, r"cotangents\[0\]: expected 60"),
    "broadcast": ({"bias": [torch.ones(5)]}, ValueError, r"bias\[0\]: expected 15 or 30 elements"),
    "tangent": ({"d_right": [torch.ones(4)]}, ValueError, r"d_right\[0\]: expected 50 or 25"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(ops, name):
    changes, error, message = WRONG[name]
    x = {"left": [torch.ones(3, 3)], "right": [torch.ones(2, 5, 5)], "bias": [torch.ones(3, 5)]}
    x = {"grads": [torch.ones(2, 2, 3, 5)], **x, "scale": [torch.ones(1)]}
    arguments = {
        "cotangents": x["grads"], **x, **{f"d_{k}": one for k, one in x.items()},
        "dims": [2, 2, 3, 5], "alpha": [1.0], "wanted": [31],
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ops.kron_double_backward(**arguments | changes)


def test_the_switch_for_products_of_matrices(ops, monkeypatch):
    launch = importlib.import_module(f"{OURS}.launch")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert launch.precision(torch.float32, "matmul") == "tf32x3"
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert launch.precision(torch.float32, "matmul") == "tf32"
        assert launch.precision(torch.float64, "matmul") == "ieee"
        monkeypatch.setattr(launch, "platform", lambda: "hip")
        assert (
            launch.precision(torch.float32, "matmul") == launch.precision(torch.float32) == "ieee"
        )
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
