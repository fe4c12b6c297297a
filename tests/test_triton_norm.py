"""Triton's batch norm against plain PyTorch in float64."""

import importlib
from dataclasses import dataclass

import pytest
import torch

from tests.triton_ops import MARKS, OURS, close, dense, draw, guarded, name_of, ops

__all__ = ["ops"]  # a fixture

pytestmark = MARKS


@dataclass(frozen=True)
class Norm:
    name: str
    shape: tuple = (2, 30, 5)
    affine: bool = True
    relu: bool = True


NORMS = [
    Norm("plain"),
    Norm("linear", relu=False),
    Norm("no_weight", affine=False),
    Norm("no_weight_linear", affine=False, relu=False),
    Norm("one_channel", (2, 37, 1)),
    Norm("one_pixel", (3, 1, 4)),
    Norm("chunks", (1, 700, 3)),
    Norm("blocks", (1, 20, 67), relu=False),
]
norms = pytest.mark.parametrize("case", NORMS, ids=lambda case: case.name)
norm_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of
)


def normalise(x, weight, bias, relu, eps=1e-3):
    """The formula, in plain PyTorch: y, mean and rstd."""
    mean = x.mean(1, keepdim=True)
    rstd = ((x - mean).square().mean(1, keepdim=True) + eps).rsqrt()
    y = (x - mean) * rstd
    if weight is not None:
        y = y * weight[:, None] + bias[:, None]
    return y.relu() if relu else y, mean[:, 0], rstd[:, 0]


def norm_operands(device, dtype, case, count=0):
    """x, weight, bias, then tensors of x's shape."""
    full = [draw(device, dtype, *case.shape) for _ in range(1 + count)]
    full[0] = guarded(full[0] + 3)
    channels = case.shape[::2]
    pair = [draw(device, dtype, *channels) if case.affine else None for _ in range(2)]
    return [full[0], *pair, *full[1:]]


def near(found, expected, case):
    """Within roundings: those of a sum over P, and some dozens of what is no larger than a peak."""
    size = (1 + expected.abs().max()).expand(expected.shape)
    close(found, expected, size, 40 + case.shape[1])


@norms
@norm_dtypes
def test_batch_norm(ops, device, case, dtype):
    x, weight, bias = norm_operands(device, dtype, case)
    y, mean, var = ops.batch_norm(x, weight, bias, 1e-3, case.relu)
    found = (y, mean, (var + 1e-3).rsqrt())
    inputs = [None if v is None else dense(v) for v in (x, weight, bias)]
    for one, expected in zip(found, normalise(*inputs, case.relu), strict=True):
        near(one, expected, case)
    assert found[0].dtype == dtype
    assert found[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def leaves(*tensors):
    return [None if v is None else dense(v).requires_grad_() for v in tensors]


def to_statistics(device, dtype, *values):
    dtype = torch.promote_types(dtype, torch.float32)
    return [v.detach().to(device, dtype) for v in values]


def first_derivative(x, weight, bias, dy, relu):
    """dx, dγ, dβ of the formula, differentiable; without weight and bias at one and zero."""
    if weight is None:
        weight = torch.ones(x.shape[0], x.shape[2], dtype=x.dtype, requires_grad=True)
        bias = torch.zeros_like(weight).requires_grad_()
    y, mean, rstd = normalise(x, weight, bias, relu)
    gradients = torch.autograd.grad(y, (x, weight, bias), dy, create_graph=True)
    return gradients, weight, mean, rstd


@norms
@norm_dtypes
def test_batch_norm_backward(ops, device, case, dtype):
    x, weight, bias, dy = norm_operands(device, dtype, case, 1)
    expected, _, mean, rstd = first_derivative(*leaves(x, weight, bias, dy), case.relu)
    statistics = to_statistics(device, dtype, mean, rstd)
    found = ops.batch_norm_backward(dy, x, *statistics, weight, bias, case.relu)
    for one, value in zip(found, expected, strict=True):
        near(one, value.detach(), case)


@norms
@norm_dtypes
def test_batch_norm_double_backward(ops, device, case, dtype):
    check_double_backward(ops, device, case, dtype, "abc")


@pytest.mark.parametrize("cotangents", ["a", "bc", "c"])
def test_batch_norm_double_backward_of_some(ops, device, cotangents):
    for case in NORMS[:2]:
        check_double_backward(ops, device, case, torch.float64, cotangents)


def check_double_backward(ops, device, case, dtype, cotangents):
    x, weight, bias, dy, a = norm_operands(device, dtype, case, 2)
    b, c = (draw(device, dtype, *case.shape[::2]) for _ in range(2))
    x64, w64, b64, dy64 = leaves(x, weight, bias, dy)
    gradients, gamma, mean, rstd = first_derivative(x64, w64, b64, dy64, case.relu)
    given = [v if name in cotangents else None for v, name in zip((a, b, c), "abc", strict=True)]
    s = sum((dense(v) * g).sum() for v, g in zip(given, gradients, strict=True) if v is not None)
    expected = torch.autograd.grad(s, (dy64, x64, gamma), allow_unused=True, materialize_grads=True)
    statistics = to_statistics(device, dtype, mean, rstd)
    found = ops.batch_norm_double_backward(*given, dy, x, *statistics, weight, bias, case.relu)
    for one, value in zip(found, expected, strict=True):
        near(one, value, case)


def test_batch_norm_far_from_zero(ops, device):
    """E[x²] − E[x]² would have no digit left."""
    x = (torch.randn(1, 700, 3) + 3000).to(device)
    y, mean, found = ops.batch_norm(x, None, None, 1e-5, False)
    var, expected = torch.var_mean(dense(x), 1, correction=0)
    torch.testing.assert_close(dense(mean), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(dense(found), var, rtol=2e-5, atol=0)
    # x − mean is exact; the mean has an error of some 3000 * 2^-24.
    torch.testing.assert_close(
        dense(y), normalise(dense(x), None, None, False, 1e-5)[0], rtol=1e-5, atol=2e-3
    )


def test_batch_norm_in_several_steps(ops, device, monkeypatch):
    launch = importlib.import_module(f"{OURS}.launch")
    monkeypatch.setattr(launch, "_SPLITS", 3)
    monkeypatch.setattr(launch, "_ELEMENTS", dict.fromkeys(launch._ELEMENTS, 64))
    case = Norm("several_steps", (2, 97, 5))
    test_batch_norm(ops, device, case, torch.float64)
    test_batch_norm_backward(ops, device, case, torch.float64)
    test_batch_norm_double_backward(ops, device, case, torch.float64)


def test_batch_norm_with_float32_parameters(ops, device):
    x, dy = (draw(device, torch.bfloat16, 2, 9, 3) for _ in range(2))
    weight, bias = (draw(device, torch.float32, 2, 3) for _ in range(2))
    y, mean, var = ops.batch_norm(x, weight, bias, 1e-3, True)
    rstd = (var + 1e-3).rsqrt()
    near(y, normalise(dense(x), dense(weight), dense(bias), True)[0], Norm("", (2, 9, 3)))
    dx, dweight, dbias = ops.batch_norm_backward(dy, x, mean, rstd, weight, bias, True)
    assert [v.dtype for v in (y, dx, dweight, dbias)] == [torch.bfloat16] * 2 + [torch.float32] * 2


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)], ids=str)
def test_empty_batch_norm(ops, device, shape):
    x, weight, bias, dy, a = norm_operands(device, torch.float32, Norm("empty", shape), 2)
    y, mean, var = ops.batch_norm(x, weight, bias, 1e-3, True)
    rstd = (var + 1e-3).rsqrt()
    assert y.shape == shape
    found = ops.batch_norm_backward(dy, x, mean, rstd, weight, bias, True)
    found += ops.batch_norm_double_backward(a, weight, bias, dy, x, mean, rstd, weight, bias, True)
    for one in found:
        assert not one.any()
