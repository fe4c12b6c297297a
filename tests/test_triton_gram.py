"""Triton's gram, its derivatives along one and as a vector-Jacobian product, against float64."""

import pytest
import torch

from tests.triton_ops import MARKS, close, dense, draw, name_of, ops

__all__ = ["ops"]  # a fixture

pytestmark = MARKS

GRAMS = [(5, 5), (7, 3), (2, 17), (1, 6), (2, 3, 4, 5), (40, 33), (0, 3), (3, 0), (2, 0, 3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
@pytest.mark.parametrize("shape", GRAMS, ids=str)
def test_gram(ops, device, shape, dtype):
    square = (*shape[:-2], shape[-1], shape[-1])
    x, m, v = (draw(device, dtype, *one) for one in (shape, shape, square))
    found = *ops.gram([x]), *ops.gram_jvp([x], [m]), *ops.gram_vjp([x], [v])
    values, sizes = (
        (a.mT @ a, a.mT @ b + b.mT @ a, a @ (c + c.mT))
        for a, b, c in (map(dense, (x, m, v)), (dense(one).abs() for one in (x, m, v)))
    )
    for one, expected, size in zip(found, values, sizes, strict=True):
        close(one, expected, size, 2 * sum(shape[-2:]) + 4)
        assert one.dtype == dtype


def test_gram_of_several(ops, device):
    """Of other dtypes, with gaps, in one call."""
    wide = draw(device, torch.bfloat16, 6, 8)
    found = ops.gram([wide[::2], wide.mT])
    for one, x in zip(found, (wide[::2], wide.mT), strict=True):
        close(one, dense(x).mT @ dense(x), dense(x).abs().mT @ dense(x).abs(), 20)
    assert ops.gram([]) == ops.gram_vjp([], []) == []


def test_gram_refuses(ops):
    x = torch.ones(4, 3)
    with pytest.raises(
        ValueError, match=r"factors\[0\]: expected a shape \[..., r, n\], got \[3\]"
    ):
        ops.gram([torch.ones(3)])
    with pytest.raises(TypeError, match=r"factors\[1\]: expected dtype torch.float32"):
        ops.gram([x, x.double()])
    with pytest.raises(ValueError, match="cotangents: expected 1 tensors, got 0"):
        ops.gram_vjp([x], [])
    with pytest.raises(ValueError, match=r"cotangents\[0\]: expected 9 elements, got \[4, 3\]"):
        ops.gram_vjp([x], [x])
    with pytest.raises(ValueError, match=r"tangents\[0\]: expected 12 elements, got \[3, 3\]"):
        ops.gram_jvp([x], [x[:3]])
