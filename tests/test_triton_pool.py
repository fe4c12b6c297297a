"""Triton's pooling against plain PyTorch in float64."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from tests.triton_ops import EVERY, MARKS, close, dense, draw, first, last, name_of, ops

__all__ = ["ops"]  # a fixture

pytestmark = MARKS


@dataclass(frozen=True)
class Pool:
    name: str
    size: tuple = (5, 6)
    channels: int = 3
    kernel: tuple = (2, 2)
    stride: tuple = (2, 2)
    padding: tuple = (0, 0)
    dilation: tuple = (1, 1)
    ceil: bool = False

    def images(self, device, dtype, tasks=2, n=2):
        return draw(device, dtype, tasks, n, *self.size, self.channels)


POOLS = [
    Pool("plain"),
    Pool("overlapping", kernel=(3, 2), stride=(1, 1), padding=(1, 1)),
    Pool("ceil", kernel=(2, 3), stride=(2, 2), padding=(1, 1), ceil=True, size=(6, 5)),
    Pool(
        "ceil_beyond_the_padding",
        kernel=(3, 3),
        stride=(3, 2),
        padding=(0, 1),
        ceil=True,
        size=(4, 6),
    ),
    Pool("whole_image", size=(3, 4), kernel=(3, 4), stride=(3, 4), channels=1),
    Pool("gaps", size=(3, 5), kernel=(1, 2), stride=(2, 3), channels=70),
    Pool("one_pixel", size=(1, 1), kernel=(1, 1), stride=(1, 1)),
    Pool("many_pixels", size=(20, 19), channels=2),
]
DILATED = [Pool("dilation", kernel=(2, 3), dilation=(2, 2), padding=(1, 1), size=(6, 7))]
# The dtype changes no index: every case in float64, one in the others.
pool_dtypes = pytest.mark.parametrize("dtype", EVERY, ids=name_of)


def flat(x):
    """Images as PyTorch takes them, those of all tasks on one axis."""
    return first(dense(x)).flatten(0, 1)


def unflat(y, x):
    """PyTorch's images as ours, of the tasks that x has."""
    return last(y.view(*x.shape[:2], *y.shape[1:]))


def check_max_pool(ops, case, x):
    options = (case.kernel, case.stride, case.padding, case.dilation)
    images = flat(x).requires_grad_()
    expected, index = F.max_pool2d(images, *options, ceil_mode=case.ceil, return_indices=True)
    y, where = ops.max_pool2d(x, *options, list(expected.shape[2:]))
    assert torch.equal(where.cpu(), unflat(index, x).int())
    torch.testing.assert_close(
        y.cpu().double(), unflat(expected, x), rtol=0, atol=0, equal_nan=True
    )
    dy = draw(x.device, x.dtype, *y.shape)
    dx = ops.max_pool2d_scatter(dy, where, list(case.size), *options)
    (gradient,) = torch.autograd.grad(expected, images, flat(dy))
    count = case.kernel[0] * case.kernel[1]
    close(dx, unflat(gradient, x), unflat(gradient, x).new_full((), 4.0 * count), count)
    v = draw(x.device, x.dtype, *x.shape)
    chosen = flat(v).flatten(2).gather(2, index.flatten(2))
    assert torch.equal(
        ops.max_pool2d_gather(v, where).cpu().double(), unflat(chosen.view(expected.shape), x)
    )


@pytest.mark.parametrize("case", POOLS + DILATED, ids=lambda case: case.name)
def test_max_pool2d(ops, device, case):
    check_max_pool(ops, case, case.images(device, torch.float64))


@pool_dtypes
def test_max_pool2d_of_every_dtype(ops, device, dtype):
    check_max_pool(ops, POOLS[1], POOLS[1].images(device, dtype))


@pytest.mark.parametrize("case", [POOLS[1], DILATED[0]], ids=lambda case: case.name)
def test_max_pool2d_of_equal_and_special_values(ops, device, case):
    x = case.images(device, torch.float32).mul_(0.7).round_()
    check_max_pool(ops, case, x)
    x[0, 0, 1:3] = float("nan")
    x[0, 1] = float("-inf")
    x[1, 1, 2, 2] = float("inf")
    check_max_pool(ops, case, x)


@pytest.mark.parametrize("case", POOLS, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("include_pad", "divisor"), [(True, 0), (False, 0), (True, 3)], ids=["pad", "no_pad", "divisor"]
)
def test_avg_pool2d(ops, device, case, include_pad, divisor):
    check_avg_pool(ops, device, case, include_pad, divisor, torch.float64)


@pool_dtypes
def test_avg_pool2d_of_every_dtype(ops, device, dtype):
    check_avg_pool(ops, device, POOLS[1], False, 0, dtype)


def check_avg_pool(ops, device, case, include_pad, divisor, dtype):
    x = case.images(device, dtype)
    images, window = flat(x).requires_grad_(), (case.kernel, case.stride, case.padding)
    rest = (include_pad, divisor or None)
    expected = F.avg_pool2d(images, *window, case.ceil, *rest)
    y = ops.avg_pool2d(x, *window, list(expected.shape[2:]), include_pad, divisor)
    terms = case.kernel[0] * case.kernel[1] + 3
    size = F.avg_pool2d(images.detach().abs(), *window, case.ceil, *rest)
    close(y, unflat(expected.detach(), x), unflat(size, x), terms)
    dy = draw(device, dtype, *y.shape)
    dx = ops.avg_pool2d_backward(dy, list(case.size), *window, include_pad, divisor)
    (gradient,) = torch.autograd.grad(expected, images, flat(dy), retain_graph=True)
    (size,) = torch.autograd.grad(expected, images, flat(dy).abs())
    close(dx, unflat(gradient, x), unflat(size, x), terms)


@pytest.mark.parametrize("shape", [(0, 2, 4, 4, 3), (2, 0, 4, 4, 3), (2, 2, 4, 4, 0)], ids=str)
def test_empty_pools(ops, device, shape):
    x, window = torch.ones(shape, device=device), ([2, 2], [2, 2], [0, 0])
    y, where = ops.max_pool2d(x, *window, [1, 1], [2, 2])
    assert y.shape == where.shape == (*shape[:2], 2, 2, shape[4])
    assert ops.max_pool2d_scatter(y, where, [4, 4], *window, [1, 1]).shape == shape
    assert ops.max_pool2d_gather(x, where).shape == y.shape
    assert ops.avg_pool2d(x, *window, [2, 2], True, 0).shape == y.shape
    assert ops.avg_pool2d_backward(y, [4, 4], *window, True, 0).shape == shape
