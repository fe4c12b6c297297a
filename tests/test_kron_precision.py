"""Lower precisions, autocast, determinism, and that every element of every output is written."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch

from fastkfo.functional import gram, kron_transform, kron_update
from tests.cases import (
    CASES,
    GRAM_SHAPES,
    IMPLEMENTATIONS,
    SMALL,
    needs_native,
    operands,
)
from tests.dense import (
    assert_near,
    dense_update,
    derivatives,
    magnitudes,
)

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
LOW = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit in the last place


def longest_sum(case):
    """The number of terms of the longest sum in the gradients of a case."""
    return max([1, *(torch.Size(item.shape).numel() for item in case.items)])


def values_and_gradients(x, op, order=2, **options):
    leaves = x.leaves()
    out = leaves.update(op, **options)
    return [*out, *derivatives(out, leaves.tensors(), order)]


@every_implementation
@every_case
def test_float32_is_as_exact_as_plain_float32(case, implementation):
    """At most twice the plain formula's own error, or 8 eps √length of the summands, normwise."""
    x, order = operands(case, torch.float32), 1 if "blas" in case.name else 2
    scales = magnitudes(x, order)
    exact = values_and_gradients(x.dense(), dense_update, order)
    plain = values_and_gradients(x, dense_update, order)
    ours = values_and_gradients(x, kron_update, order, implementation=implementation)
    floor = 8 * torch.finfo(torch.float32).eps * longest_sum(case) ** 0.5
    for k, (e, p, u, scale) in enumerate(zip(exact, plain, ours, scales, strict=True)):
        assert u.dtype == torch.float32
        error, allowed = (u.double() - e).norm(), (p.double() - e).norm()
        assert error <= max(2 * allowed, floor * scale.norm()), f"[{k}]: {error} for {allowed}"


@every_implementation
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", [case for case in SMALL if not case.psd], ids=str)
def test_low_precision_rounds_once(case, dtype, implementation):
    """Sums are taken in float32: the result is the exact one, rounded."""
    x = operands(case, dtype)
    out = x.update(kron_update, implementation=implementation)
    for actual, expected in zip(out, x.dense().update(dense_update), strict=True):
        assert actual.dtype == dtype
        assert_near(actual, expected, 1.01 * LOW[dtype])


@every_implementation
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_accumulates_in_float32(dtype, implementation):
    """4096 ones: a sum in bfloat16 ends at 256, one in float16 at 2048."""
    g, c = torch.ones(1, 4096, dtype=dtype), torch.zeros(4096, 4096, dtype=dtype)
    c[:, 0] = 1
    (u,) = kron_transform([g], right=[c], implementation=implementation)
    assert u[0, 0] == 4096
    batch = torch.ones(4096, 1, 1, dtype=dtype)
    bias = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
    (u,) = kron_transform([batch], bias=[bias], implementation=implementation)
    u.sum().backward()
    assert bias.grad.item() == 4096
    (square,) = gram([torch.ones(4096, 1, dtype=dtype)], implementation=implementation)
    assert square.item() == 4096


@every_implementation
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", ["operands_lrbs", "ragged", "tasks_all", "scale_one"])
def test_low_precision_gradients(name, dtype, implementation):
    case = next(case for case in CASES if case.name == name)
    x = operands(case, dtype)
    actual = values_and_gradients(x, kron_update, order=1, implementation=implementation)
    expected = values_and_gradients(x.dense(), dense_update, order=1)
    for a, e, scale in zip(actual, expected, magnitudes(x, 1), strict=True):
        assert a.dtype == dtype
        assert_near(a, e, 4 * LOW[dtype], scale=scale)  # squares of psd factors are rounded too


@every_implementation
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", ["operands_lrbs", "ragged", "tasks_all", "lr_scalar", "lr_list"])
def test_autocast_promotes_to_float32(name, dtype, implementation):
    """The result is float32, and as exact: autocast's own products would not be."""
    case = next(case for case in CASES if case.name == name)
    x = operands(case, dtype)
    leaves, dense = x.leaves(), x.dense().leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = leaves.update(kron_update, implementation=implementation)
    expected = dense.update(dense_update)
    for actual, wanted in zip(out, expected, strict=True):
        assert actual.dtype == torch.float32
        assert_near(actual, wanted, 1e-6)
    received = torch.autograd.grad([u.square().sum() for u in out], leaves.tensors())
    wanted = torch.autograd.grad([u.square().sum() for u in expected], dense.tensors())
    for tensor, a, e in zip(leaves.tensors(), received, wanted, strict=True):
        assert a.dtype == tensor.dtype == dtype
        assert_near(a, e, 4 * LOW[dtype])


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast_lowers_nothing(dtype, implementation):
    g, a = torch.randn(64, 64, dtype=dtype), torch.randn(64, 64, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (u,) = kron_transform([g], [a], psd=True, implementation=implementation)
        (square,) = gram([a], implementation=implementation)
    assert u.dtype == square.dtype == dtype
    assert_near(u, a.double().mT @ a.double() @ g.double(), 1e-6)
    assert_near(square, a.double().mT @ a.double(), 1e-6)


@every_implementation
def test_autocast_mixes_low_and_full_precision(implementation):
    g, a = torch.randn(4, 3).bfloat16(), torch.randn(4, 4)
    with pytest.raises(TypeError, match=r"left\[0\].*bfloat16.*float32"):
        kron_transform([g], [a], implementation=implementation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (u,) = kron_transform([g], [a], implementation=implementation)
    assert_near(u, a.double() @ g.double(), 1e-6)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if "blas_" not in c.name], ids=str)
def test_same_bits_for_any_number_of_threads(case, dtype):
    x = operands(case, dtype)
    results = []
    for count in (1, 2, 2, 5):
        with threads(count):
            results.append(values_and_gradients(x, kron_update, implementation="native"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.fixture
def poisoned():
    """Outputs, and the kernels' working memory, are full of NaN before they are written."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    with threads(1):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            nan = torch.full((64, 60, 40), float("nan"), dtype=dtype)
            kron_transform([nan], [nan[0, :, :1] @ nan[0, :1, :1].expand(1, 60)], [nan[0, :40]])
            gram([nan])
        yield
    torch.use_deterministic_algorithms(False)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@every_case
def test_every_element_is_written(case, dtype, poisoned):
    x = operands(case, dtype)
    for result in values_and_gradients(x, kron_update, implementation="native"):
        assert result.isfinite().all()


@needs_native
@pytest.mark.parametrize("shapes", GRAM_SHAPES.values(), ids=GRAM_SHAPES)
def test_every_element_of_gram_is_written(shapes, poisoned):
    factors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    out = gram(factors, implementation="native")
    for result in [*out, *derivatives(out, factors, 2)]:
        assert result.isfinite().all()


ALLOCATIONS = """
import torch
from fastkfo.functional import kron_update
from tests.cases import CASES, operands
from tests.dense import assert_near, derivatives

torch.set_num_threads(1)
for case in CASES:
    if "blas" not in case.name:
        results = []
        for implementation in ("native", "reference"):
            x = operands(case).leaves()
            out = x.update(kron_update, implementation=implementation)
            results.append([*out, *derivatives(out, x.tensors(), 2)])
        for a, b in zip(*results, strict=True):
            assert_near(a, b, 1e-10, case.name)
print("compared")
"""


@needs_native
def test_memory_from_malloc_is_written_before_it_is_read():
    """glibc fills what it hands out: partial sums and scratch come from there."""
    environment = os.environ | {"MALLOC_PERTURB_": "128"}  # bytes 0x7f: 3e38 or 1e306
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATIONS],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "compared", done.stderr
