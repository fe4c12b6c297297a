"""The raw ops by PyTorch's own checks, and what bad input is told."""

import pytest
import torch
from torch import nn
from torch.library import opcheck

import fastkfo
from fastkfo import functional as fn
from fastkfo.kernels import native
from tests.cases import needs_native

X = torch.randn(2, 3, 6, 5, 5)
W = torch.randn(2, 4, 6, 3, 3)
C = torch.randn(2, 6)


def raw_calls():
    """Every raw op with operands of its own layout."""
    x, w, b = torch.randn(2, 3, 5, 4, 6), torch.randn(2, 4, 3, 3, 2), torch.randn(2, 4)
    window = ([2, 1], [1, 0], [1, 1], 2)
    dy = torch.randn(2, 3, 3, 3, 4)
    rows, weight, bias = torch.randn(2, 7, 5), torch.randn(2, 5), torch.randn(2, 5)
    per_row = torch.rand(2, 7)
    stats = (torch.randn(2, 5), torch.rand(2, 5))
    pool = ([2, 2], [2, 1], [1, 0], [1, 1])
    small, where = torch.randn(2, 3, 3, 3, 6), torch.zeros(2, 3, 3, 3, 6, dtype=torch.int32)
    return {
        "conv2d": (x, w, b, None, None, *window),
        "conv2d_input": (dy, w, [5, 4], *window),
        "conv2d_weight": (x, dy, [3, 2], *window, True),
        "batch_norm": (rows, weight, bias, 1e-5, True),
        "batch_norm_backward": (rows, rows, *stats, weight, bias, True),
        "batch_norm_double_backward": (
            rows, weight, None, rows, rows, *stats, weight, bias, False,
        ),
        "layer_norm": (rows, weight, None, 1e-5),
        "layer_norm_backward": (rows, rows, per_row, per_row, weight),
        "layer_norm_double_backward": (
            rows, None, bias, rows, rows, per_row, per_row, weight,
        ),
        "max_pool2d": (x, *pool, [3, 3]),
        "max_pool2d_scatter": (small, where, [5, 4], *pool),
        "max_pool2d_gather": (x, where),
        "avg_pool2d": (x, *pool[:3], [3, 3], False, 0),
        "avg_pool2d_backward": (small, [5, 4], *pool[:3], True, 3),
    }  # fmt: skip


@needs_native
@pytest.mark.parametrize("name", raw_calls())
def test_opcheck(name):
    assert native.available()
    op = getattr(torch.ops.fastkfo, name).default
    args = raw_calls()[name]
    opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))
    second = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    ]
    opcheck(op, tuple(second), test_utils=("test_faketensor",))


@needs_native
@pytest.mark.parametrize("name", raw_calls())
def test_every_number_is_written(name):
    """Outputs begin as NaN."""
    op = getattr(torch.ops.fastkfo, name).default
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        found = op(*raw_calls()[name])
    finally:
        torch.use_deterministic_algorithms(deterministic)
    for y in (found,) if isinstance(found, torch.Tensor) else found:
        assert y.isfinite().all()


# Operands whose last axis may have any length.
FREE = {
    "conv2d": (1,), "conv2d_weight": (0, 1), "max_pool2d": (0,), "avg_pool2d": (0,),
    "avg_pool2d_backward": (0,),
}  # fmt: skip


@needs_native
@pytest.mark.parametrize("name", raw_calls())
def test_raw_ops_refuse(name):
    """Other dtypes, other sizes and gaps, before any memory is read."""
    assert native.available()
    op, args = getattr(torch.ops.fastkfo, name).default, raw_calls()[name]
    for k, given in enumerate(args):
        if not isinstance(given, torch.Tensor):
            continue
        gaps = torch.stack([given, given], -1)[..., 0]
        changed = [given.half(), given.flatten()[:-1], gaps]
        if k not in FREE.get(name, ()):
            changed += [given[..., 1:].contiguous(), torch.empty_like(given)[..., :0]]
        for other in changed:
            with pytest.raises(RuntimeError, match="fastkfo"):
                op(*args[:k], other, *args[k + 1 :])


@needs_native
def test_gather_reads_no_pixel_that_is_not_there():
    assert native.available()
    where = torch.tensor([-1, 0, 3, 4, 2**31 - 1], dtype=torch.int32).view(1, 1, 1, 5, 1)
    v = torch.arange(1.0, 5).view(1, 1, 2, 2, 1)
    found = torch.ops.fastkfo.max_pool2d_gather(v, where)
    assert found.flatten().tolist() == [0, 1, 4, 0, 0]


REFUSED = {
    "no tensor": (TypeError, "x: expected a tensor", lambda: fn.conv2d([1], W)),
    "ints": (TypeError, "x: expected one of", lambda: fn.conv2d(X.long(), W)),
    "dtypes": (TypeError, "weight: expected torch.float32", lambda: fn.conv2d(X, W.double())),
    "rank": (ValueError, r"x: expected a shape \[T, N, C, H, W\]", lambda: fn.conv2d(X[0], W)),
    "weight rank": (ValueError, "weight: expected a shape", lambda: fn.conv2d(X, W[0])),
    "tasks": (ValueError, "weight: expected 2 tasks as x, got 1", lambda: fn.conv2d(X, W[:1])),
    "channels": (ValueError, "weight: expected 6 channels", lambda: fn.conv2d(X, W[:, :, :4])),
    "groups": (ValueError, "groups: expected a divisor of 6", lambda: fn.conv2d(X, W, groups=3)),
    "no groups": (ValueError, "groups: expected an int", lambda: fn.conv2d(X, W, groups=0)),
    "bias": (ValueError, r"bias: expected shape \[2, 4\]", lambda: fn.conv2d(X, W, C)),
    "stride": (ValueError, "stride: expected at least 1", lambda: fn.conv2d(X, W, stride=0)),
    "padding": (TypeError, "padding: expected one int", lambda: fn.conv2d(X, W, padding="x")),
    "dilation": (TypeError, "dilation: expected ints", lambda: fn.conv2d(X, W, dilation=(1, 2.0))),
    "window": (ValueError, "window of at most 5", lambda: fn.conv2d(X, W, dilation=4)),
    "norm rank": (ValueError, "x: expected a shape", lambda: fn.batch_norm(X[0])),
    "norm weight": (ValueError, "weight: expected shape", lambda: fn.batch_norm(X, C[:1])),
    "norm bias": (TypeError, "bias: expected", lambda: fn.batch_norm(X, C, C.double())),
    "one value": (
        ValueError, "more than one value per channel", lambda: fn.batch_norm(X[:, :1, :, 0, 0]),
    ),
    "eps": (ValueError, "eps: expected at least 0", lambda: fn.batch_norm(X, eps=-1.0)),
    "rows": (ValueError, "x: expected a shape", lambda: fn.layer_norm(X[0, 0, 0, 0])),
    "row weight": (ValueError, "weight: expected shape", lambda: fn.layer_norm(X, C)),
    "pool rank": (ValueError, "x: expected a shape", lambda: fn.max_pool2d(X[0], 2)),
    "pool padding": (ValueError, "padding: expected at", lambda: fn.max_pool2d(X, 2, padding=2)),
    "pool window": (ValueError, "kernel_size: expected at most", lambda: fn.avg_pool2d(X, 6)),
    "divisor": (ValueError, "divisor_override", lambda: fn.avg_pool2d(X, 2, divisor_override=0)),
    "linear": (ValueError, "weight: expected a shape", lambda: fn.linear(C[:, None], W)),
    "linear rank": (ValueError, "x: expected a shape", lambda: fn.linear(C, C)),
    "implementation": (ValueError, "implementation", lambda: fn.conv2d(X, W, implementation="x")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(name):
    kind, message, call = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_batch_of_one_in_a_learner():
    """The error is batch norm's own, whatever the tasks run on."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    loop = fastkfo.InnerLoop(fastkfo.algorithms.MAML(model, lr=0.1), nn.CrossEntropyLoss(), 1)
    x, y = torch.randn(2, 1, 1, 3, 3), torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="more than one value per channel"):
        loop(x, y, x, y)
