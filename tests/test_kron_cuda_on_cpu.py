"""The CUDA code of the Kronecker update, its blocks emulated on a CPU, under the public ops.

tests/cuda_on_cpu has the emulation; tests/test_kron.py runs the same cases on a GPU.
"""

import importlib
import shutil

import pytest
import torch

from fastkfo.functional import gram, kron_transform, kron_update
from fastkfo.kernels import kron as kernels
from tests import emulation, test_gram, test_kron, test_kron_raw
from tests.cases import CASES, GRAM_SHAPES, SMALL, needs_native, operands
from tests.dense import assert_near, dense_update, worst

OPS = (
    "kron_forward", "kron_backward", "kron_double_backward", "gram", "gram_vjp", "gram_jvp",
)  # fmt: skip
CPU = torch.device("cpu")

pytestmark = [
    needs_native,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ on Linux"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The ops, built from csrc/cuda."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    with emulation.emulated("kron.cpp", "cuda_on_cpu_kron", OPS, folder) as ops:
        yield ops


class Called:
    """Takes the place of fastkfo.kernels.kron.run."""

    def __init__(self, ops):
        self.ops, self.tf32, self.names = ops, False, []

    def __call__(self, implementation, name, *args):
        self.names.append(name)
        op, low = getattr(self.ops, name), args[0][0].dtype in kernels.LOW
        return kernels.in_float32(op, *args) if low else op(*args, self.tf32)


@pytest.fixture
def called(library, monkeypatch):
    """The public ops on the emulated library."""
    run = Called(library)
    for name in ("kron_autograd", "gram"):
        monkeypatch.setattr(importlib.import_module(f"fastkfo.functional.{name}"), "run", run)
    return run


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_two_derivatives(called, case):
    """By the dense formula, in float64."""
    test_kron.derivatives_agree(case, "native", CPU, order=1 if case.heavy else 2)
    x = operands(case)
    test_kron.compare(x.update(kron_update), x.dense().update(dense_update))
    assert "kron_forward" in called.names


@pytest.mark.parametrize(
    "case", [x for x in SMALL if "lrbs" in x.name or "tasks" in x.name], ids=str
)
def test_the_transform_alone(called, case):
    test_kron.derivatives_agree(case, "native", CPU, order=2, op="transform")


@pytest.mark.parametrize("shapes", GRAM_SHAPES.values(), ids=GRAM_SHAPES)
def test_squares_and_three_derivatives(called, shapes):
    order = 1 if max(torch.Size(s).numel() for s in shapes) > 10_000 else 3
    found = [
        test_gram.all_orders(test_gram.build(shapes), op, order) for op in (gram, test_gram.dense)
    ]
    test_gram.compare(*found)


CONV = [x for x in CASES if x.name in ("operands_lrb", "ragged", "tasks_all", "conv_33x5x9")]


@pytest.mark.parametrize("case", CONV, ids=str)
def test_float32(called, case):
    assert worst(kron_update, operands(case, torch.float32)) < 2e-6


@pytest.mark.parametrize("case", CONV, ids=str)
def test_tf32_only_where_it_is_allowed(called, case):
    """Its 11 bits, and sums in float32: the error of a few roundings."""
    called.tf32 = True
    assert 1e-6 < worst(kron_update, operands(case, torch.float32)) < 2**-9


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("case", [x for x in CONV if not x.psd], ids=str)
def test_low_precision(called, case, dtype, unit):
    """It goes through float32, and rounds once."""
    x = operands(case, dtype)
    for a, b in zip(x.update(kron_update), x.dense().update(dense_update), strict=True):
        assert a.dtype == dtype
        assert_near(a, b, 0.51 * unit)


def test_more_items_than_a_launch_holds(called):
    torch.manual_seed(0)
    grads = [torch.randn(1 + k % 5, 1 + k % 7, dtype=torch.float64) for k in range(70)]
    left = [torch.randn(len(g), len(g), dtype=torch.float64, requires_grad=True) for g in grads]
    out = kron_transform(grads, left, psd=True)
    for a, g, x in zip(out, grads, left, strict=True):
        assert_near(a, x.mT @ x @ g, 1e-12)
    found = torch.autograd.grad([x.sin().sum() for x in out], left)
    want = torch.autograd.grad(
        sum((x.mT @ x @ g).sin().sum() for g, x in zip(grads, left, strict=True)), left
    )
    test_kron.compare(found, want)


def test_sums_over_many_tasks(called):
    """Parts of a shared factor's gradient, more than the warps that add them."""
    torch.manual_seed(0)
    g = torch.randn(40, 3, 5, 4, dtype=torch.float64)
    bias = torch.randn(40, 5, 4, dtype=torch.float64)
    left = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    (u,) = kron_transform([g], [left], bias=[bias])
    test_kron.compare(
        torch.autograd.grad(u.sin().sum(), left),
        torch.autograd.grad((left @ g + bias.unsqueeze(1)).sin().sum(), left),
    )


def test_it_is_repeatable(called):
    x = operands(next(x for x in CASES if x.name == "chunks_tasks"), torch.float32)

    def once():
        leaves = x.leaves()
        out = leaves.update(kron_update)
        return [*out, *torch.autograd.grad([y.sum() for y in out], leaves.tensors())]

    for a, b in zip(once(), once(), strict=True):
        assert torch.equal(a, b)


def test_a_task_with_nan_stays_alone(called):
    g = torch.ones(3, 2, 4, 5)
    g[1] = torch.nan
    left = torch.eye(4).repeat(3, 1, 1)
    (u,) = kron_transform([g], [left], [torch.eye(5)])
    assert [x.isfinite().all().item() for x in u] == [True, False, True]


@pytest.mark.parametrize("name", test_kron_raw.WRONG)
@pytest.mark.parametrize("op", test_kron_raw.OPS)
def test_wrong_calls_are_refused(library, name, op):
    with pytest.raises(RuntimeError, match="fastkfo"):
        test_kron_raw.OPS[op](library, **test_kron_raw.WRONG[name])


@pytest.mark.parametrize("name", test_kron_raw.WRONG_DERIVATIVE)
def test_wrong_derivatives_are_refused(library, name):
    for op in ("backward", "double_backward"):
        with pytest.raises(RuntimeError, match="fastkfo"):
            test_kron_raw.OPS[op](library, **test_kron_raw.WRONG_DERIVATIVE[name])


@pytest.mark.parametrize("name", test_kron_raw.WRONG_DOUBLE)
def test_wrong_tangents_are_refused(library, name):
    with pytest.raises(RuntimeError, match="fastkfo"):
        test_kron_raw.double_backward(library, **test_kron_raw.WRONG_DOUBLE[name])


@pytest.mark.parametrize(
    ("op", "lists"), test_kron_raw.WRONG_GRAM.values(), ids=test_kron_raw.WRONG_GRAM
)
def test_wrong_factors_are_refused(library, op, lists):
    with pytest.raises(RuntimeError, match="fastkfo"):
        getattr(library, op)(*lists)


def test_the_switch_is_read_in_a_compiled_function():
    def step(x):
        return x + 1 if kernels._tf32_is_allowed() else x

    x, matmul = torch.zeros(1), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for allowed in (False, True, False):
            matmul.fp32_precision = "tf32" if allowed else "ieee"
            assert torch.compile(step, fullgraph=True, backend="eager")(x).item() == allowed
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("item", "blas"),
    [
        ((1, 1, 64, 64, True), False),
        ((1, 1, 256, 256, True), True),  # one block of 132
        ((256, 1, 256, 256, True), False),
        ((1, 2048, 64, 9, True), False),  # 32 tasks of one factor
        ((8, 256, 256, 9, True), True),  # 28 of a batch each: 80 units
        ((16, 256, 256, 9, True), False),
        ((32, 64, 64, 9, True), False),
        ((1, 1, 257, 2, True), True),
        ((1, 1, 8, 4608, True), True),
        ((8, 8, 8, 8, False), True),
        ((1, 0, 64, 9, True), False),
    ],
    ids=str,
)
def test_what_is_left_to_blas(item, blas):
    assert kernels.for_blas(*item) == blas


def test_a_tangent_of_an_absent_factor_is_refused(library):
    with pytest.raises(RuntimeError, match="absent factor"):
        test_kron_raw.double_backward(
            library, left=[None, None], d_left=[torch.ones(3, 3), None], wanted=[1, 1]
        )


def test_positions_beyond_32_bits(library):
    """Tasks that lie 2^31 elements apart: most of the memory between them is never touched."""
    far = 2**31 + 64
    try:
        room = torch.empty(far + 64)  # 8 GiB of addresses
    except RuntimeError:
        pytest.skip("the system grants no memory that is not used")
    g = room.as_strided((2, 1, 2, 3), (far, 0, 3, 1))
    g.copy_(torch.arange(12.0).reshape(2, 1, 2, 3))
    left = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    (u,) = library.kron_forward([g], [left], [], [], [], [], [2, 1, 2, 3], [1.0])
    assert torch.equal(u, left @ g)
