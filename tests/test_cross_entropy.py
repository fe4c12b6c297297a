"""cross_entropy against `F.cross_entropy` task after task, to the third derivative.

The raw ops are called by themselves, too: they have to refuse what would make them read outside.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, hessian, vmap

from fastkfo import ImplementationUnavailable
from fastkfo.functional import cross_entropy
from fastkfo.reference import cross_entropy as reference
from tests.cases import HAS_NATIVE, implementations, lay_out, needs_native, skip_unless_available
from tests.dense import assert_near, derivatives

every_implementation = pytest.mark.parametrize("implementation", implementations())
SHAPES = {
    "usual": (4, 25, 5),
    "ragged": (3, 7, 11),
    "wide": (2, 3, 129),
    "tall": (2, 67, 3),
    "many_tasks": (37, 2, 2),
    "one_task": (1, 6, 5),
    "one_sample": (5, 1, 3),
    "one_class": (3, 4, 1),
    "one_number": (1, 1, 1),
    "no_tasks": (0, 3, 4),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
LAYOUTS = ("contiguous", "transposed", "gaps", "expanded", "offset", "tasks_last", "one_for_all")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
LOW = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit in the last place


def arrange(x, layout):
    """`lay_out`, two more layouts, and gaps of labels that are out of range."""
    if layout == "tasks_last":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "one_for_all":
        return x.narrow(0, 0, min(1, len(x))).expand(x.shape)
    if layout == "gaps" and not x.is_floating_point():
        wide = x.new_full((*x.shape, 2), 10**12)
        wide[..., 0] = x
        return wide[..., 0]
    return lay_out(x, layout)


def build(shape, dtype=torch.float64, device="cpu", layout="contiguous", size=2.0):
    generator = torch.Generator().manual_seed(0)
    z = (size * torch.randn(shape, generator=generator)).bfloat16().to(device, dtype)
    y = torch.randint(shape[-1], shape[:2], generator=generator).to(device)
    return arrange(z, layout).detach().requires_grad_(), arrange(y, layout)


def loop(z, y):
    """The oracle."""
    rows = [F.cross_entropy(a, b) for a, b in zip(z, y, strict=True)]
    return torch.stack(rows) if rows else z.sum((1, 2))


def all_orders(z, y, op, order):
    out = op(z, y)
    return [out, *derivatives([out], [z], order)]


def compare(actual, expected, tolerance=1e-10):
    assert len(actual) == len(expected)
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_near(a, e, tolerance, f"[{k}]")


def with_implementation(implementation):
    return lambda z, y: cross_entropy(z, y, implementation=implementation)


@every_implementation
@every_shape
@pytest.mark.parametrize("layout", LAYOUTS)
def test_value_and_three_derivatives(shape, layout, implementation, device):
    skip_unless_available(implementation, device, "")
    z, y = build(shape, device=device, layout=layout)
    before = z.detach().clone(), y.clone()
    for order in (2, 3):  # the last derivative, of which none is taken, is another kernel
        actual = all_orders(z, y, with_implementation(implementation), order)
        compare(actual, all_orders(z, y, loop, order))
    assert torch.equal(z, before[0])
    assert torch.equal(y, before[1])


@every_implementation
@pytest.mark.parametrize("name", ["ragged", "one_class", "one_sample"])
def test_gradcheck(name, implementation):
    z, y = build(SHAPES[name])

    def op(z):
        return cross_entropy(z, y, implementation=implementation)

    assert torch.autograd.gradcheck(op, [z])
    assert torch.autograd.gradgradcheck(op, [z])


@every_implementation
@every_shape
@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
def test_float32_is_as_exact_as_plain_float32(shape, offset, implementation):
    """At most twice PyTorch's own error, or 8 eps √length. An offset common to a row is nothing."""
    z, y = build(shape, torch.float32)
    z = (z + offset).detach().requires_grad_()
    ours = all_orders(z, y, with_implementation(implementation), 2)
    plain = all_orders(z, y, loop, 2)
    exact = all_orders(z.detach().double().requires_grad_(), y, loop, 2)
    floor = 8 * torch.finfo(torch.float32).eps * (shape[1] * shape[2]) ** 0.5
    for k, (u, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
        assert u.dtype == torch.float32
        error, allowed = (u.double() - e).norm(), (p.double() - e).norm()
        assert error <= max(2 * allowed, floor * e.norm()), f"[{k}]: {error} for {allowed}"


@every_implementation
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_takes_the_formula(dtype, implementation):
    z, y = build(SHAPES["ragged"], dtype)
    loss = cross_entropy(z, y, implementation=implementation)
    assert loss.dtype == dtype
    assert torch.equal(loss, reference.cross_entropy(z, y)[0])
    (g,) = torch.autograd.grad(loss.sum(), z)
    exact = z.detach().double().requires_grad_()
    (e,) = torch.autograd.grad(loop(exact, y).sum(), exact)
    # Every log p is rounded once, and so is their mean; all have the same sign.
    assert_near(loss, loop(exact, y), 2.02 * LOW[dtype])
    # p, p − e and the quotient are rounded once.
    p = torch.softmax(exact, -1)
    assert_near(g, e, 3.03 * LOW[dtype], scale=p.norm() / z.shape[1] + e.norm())


@every_implementation
@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 1), (2, 0), (-1, -1)])
def test_vmap(in_dims, implementation):
    z, y = build((3, 4, 5))
    size = 6
    z, y = (
        x if d is None else torch.stack([x.detach().roll(k, 1) for k in range(size)], d)
        for x, d in zip((z.detach(), y), in_dims, strict=True)
    )

    def row(x, d, k):
        return x if d is None else x.select(d, k)

    def first(f):
        return grad(lambda z, y: f(z, y).square().sum())

    op = with_implementation(implementation)
    for make in (lambda f: f, first, lambda f: first(first(f))):
        rows = [make(loop)(row(z, in_dims[0], k), row(y, in_dims[1], k)) for k in range(size)]
        compare([vmap(make(op), in_dims)(z, y)], [torch.stack(rows)])


@every_implementation
def test_torch_func_hessian(implementation):
    z, y = build((2, 3, 4))
    ours = hessian(lambda z: cross_entropy(z, y, implementation=implementation).sum())(z.detach())
    compare([ours], [torch.autograd.functional.hessian(lambda z: loop(z, y).sum(), z)])


@every_implementation
def test_torch_compile(implementation):
    torch.compiler.reset()
    z, y = build((2, 3, 4))
    op = torch.compile(with_implementation(implementation), backend="aot_eager")
    eager = torch.autograd.grad(loop(z, y).square().sum(), z)
    compare(torch.autograd.grad(op(z, y).square().sum(), z), eager)


@every_implementation
def test_lazily_negated_logits(implementation):
    z, y = build((2, 3, 4))
    actual = cross_entropy(torch._neg_view(z.detach()), y, implementation=implementation)
    compare([actual], [loop(-z, y)])


@every_implementation
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("everywhere", [False, True], ids=["one_number", "all_numbers"])
def test_a_task_that_is_not_finite_stays_alone(bad, everywhere, implementation):
    z, y = build((5, 6, 3))
    op = with_implementation(implementation)
    clean = all_orders(z, y, op, 2)
    sick = z.detach().clone()
    sick[2] = torch.full_like(sick[2], bad) if everywhere else sick[2]
    sick[2, 4, 1] = bad
    actual = all_orders(sick.requires_grad_(), y, op, 2)
    others = torch.tensor([0, 1, 3, 4])
    for a, c in zip(actual, clean, strict=True):
        assert torch.equal(a[others], c[others])
    torch.testing.assert_close(actual[0], loop(sick, y), equal_nan=True)
    if everywhere or bad != float("-inf"):
        assert not actual[0][2].isfinite()


@every_implementation
def test_extreme_logits(implementation):
    """A certain class costs nothing, an impossible one its distance; nothing overflows."""
    z = torch.tensor([[[800.0, 0.0], [-800.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0, 0]])
    loss = cross_entropy(z, y, implementation=implementation)
    assert loss.tolist() == [400.0]
    (g,) = torch.autograd.grad(loss, z)
    assert g.tolist() == [[[0.0, 0.0], [-0.5, 0.5]]]


def t(*shape, **options):
    return torch.ones(*shape, **options)


def labels(*shape, fill=0):
    return torch.full(shape, fill, dtype=torch.int64)


A, C, Y, OUT_OF_RANGE = t(2, 3, 4), t(2), labels(2, 3), labels(2, 3)
OUT_OF_RANGE[1, 2] = 4
A_SHAPE = r"logits: expected a shape \[T, S, C\] with S and C at least 1, got "
OF_INT64 = "labels: expected a tensor of int64, got "
WRONG = {
    "logits_list": ([1.0], Y, TypeError, "logits: expected a tensor, got list"),
    "logits_int": (A.int(), Y, TypeError, "logits: .*float32.*torch.int32"),
    "logits_matrix": (t(3, 4), labels(3), ValueError, A_SHAPE + r"\[3, 4\]"),
    "no_samples": (t(2, 0, 4), labels(2, 0), ValueError, A_SHAPE + r"\[2, 0, 4\]"),
    "no_classes": (t(2, 3, 0), Y, ValueError, A_SHAPE + r"\[2, 3, 0\]"),
    "labels_list": (A, [[0] * 3] * 2, TypeError, OF_INT64 + "list"),
    "labels_int32": (A, Y.int(), TypeError, OF_INT64 + "torch.int32"),
    "labels_float": (A, t(2, 3), TypeError, OF_INT64 + "torch.float32"),
    "labels_swapped": (A, labels(3, 2), ValueError, r"labels: .*\[2, 3\], got \[3, 2\]"),
    "labels_device": (A, Y.to("meta"), ValueError, "labels: .*cpu.*got meta"),
    "label_too_large": (A, OUT_OF_RANGE, ValueError, "labels: .*0 to 3, got 4"),
    "label_negative": (A, labels(2, 3, fill=-1), ValueError, "labels: .*0 to 3, got -1"),
    "label_ignored": (A, labels(2, 3, fill=-100), ValueError, "0 to 3, got -100"),
}  # fmt: skip


@every_implementation
@pytest.mark.parametrize(("z", "y", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(z, y, error, message, implementation):
    with pytest.raises(error, match=message):
        cross_entropy(z, y, implementation=implementation)


def test_wrong_implementation():
    with pytest.raises(ValueError, match=r"implementation: expected one of.*got 'fast'"):
        cross_entropy(A, Y, implementation="fast")
    with pytest.raises(ImplementationUnavailable, match="triton"):
        cross_entropy(A, Y, implementation="triton")
    if not HAS_NATIVE:
        with pytest.raises(ImplementationUnavailable, match="native"):
            cross_entropy(A, Y, implementation="native")


@every_implementation
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(1, 9)),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    size=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
)
def test_any_shape_and_size(implementation, shape, layout, dtype, size):
    """Also: no loss is negative, a sample's gradients add up to zero, an offset is nothing."""
    z, y = build(shape, dtype, layout=layout, size=size)
    op = with_implementation(implementation)
    loss = op(z, y)
    bound = 8 * torch.finfo(dtype).eps * (shape[1] * shape[2]) ** 0.5  # √length
    exact = z.detach().double().requires_grad_()
    expected = loop(exact, y)
    one = expected.detach().norm() + 1
    assert_near(loss, expected, bound, scale=one)
    assert (loss >= -bound).all()
    (g,) = torch.autograd.grad(loss.sum(), z)
    (e,) = torch.autograd.grad(expected.sum(), exact)
    assert_near(g, e, bound, scale=one)
    assert_near(g.sum(-1), torch.zeros(shape[:2]), bound, scale=one)
    rows = torch.arange(shape[1], dtype=dtype).unsqueeze(1)  # up to 8, which costs as many bits
    assert_near(op(z + rows, y), expected, 8 * bound, scale=one + size)


def raw(*operands):
    ops = torch.ops.fastkfo
    return (ops.cross_entropy if len(operands) == 2 else ops.cross_entropy_double_backward)(
        *operands
    )


@needs_native
@every_dtype
@pytest.mark.parametrize("name", SHAPES)
def test_opcheck(name, dtype):
    k = list(SHAPES).index(name) + (dtype == torch.float64)
    shape, layout = SHAPES[name], ("contiguous", "transposed", "tasks_last")[k % 3]
    z, y = build(shape, dtype, layout=layout)
    torch.library.opcheck(torch.ops.fastkfo.cross_entropy, (z.detach(), y))
    _, p, residual = raw(z.detach(), y)
    operands = arrange(torch.randn(shape), layout).to(dtype), p[:, 0, 0], p, residual
    torch.library.opcheck(torch.ops.fastkfo.cross_entropy_double_backward, operands)


WRONG_RAW = {
    "label_too_large": (A, OUT_OF_RANGE),
    "label_far_too_large": (A, labels(2, 3, fill=2**62)),
    "label_negative": (A, -OUT_OF_RANGE),
    "label_of_no_classes": (t(2, 3, 0), Y),
    "labels_int32": (A, Y.int()),
    "labels_float": (A, t(2, 3)),
    "labels_swapped": (A, labels(3, 2)),
    "labels_vector": (A, labels(6)),
    "labels_fewer_tasks": (A, labels(1, 3)),
    "logits_half": (A.half(), Y),
    "logits_matrix": (t(2, 3), Y),
    "v_smaller": (t(2, 3, 3), C, A, A),
    "v_dtype": (A.double(), C, A, A),
    "cotangent_smaller": (A, t(1), A, A),
    "cotangent_dtype": (A, C.double(), A, A),
    "residual_smaller": (A, C, A, t(2, 3)),
    "p_matrix": (t(6, 4), C, t(6, 4), t(6, 4)),
    "p_half": (A.half(), C.half(), A.half(), A.half()),
}


@needs_native
@pytest.mark.parametrize("operands", WRONG_RAW.values(), ids=WRONG_RAW)
def test_wrong_raw_call(operands):
    with pytest.raises(RuntimeError, match="fastkfo"):
        raw(*operands)


WITHOUT_MEMORY = """
from tests.cases import HAS_NATIVE  # loads the library
from tests.test_cross_entropy import labels, raw, t
for good in ([t(2, 3, 4), labels(2, 3)], [t(2, 3, 4), t(2), t(2, 3, 4), t(2, 3, 4)]):
    raw(*good)
    for k, x in enumerate(good):
        gone = x.clone()
        gone.untyped_storage().resize_(0)
        try:
            raw(*good[:k], gone, *good[k + 1 :])
            raise AssertionError(f"operand {k} of {len(good)}: no error")
        except RuntimeError as error:
            assert "fastkfo" in str(error), error
"""


@needs_native
def test_operands_without_memory():
    """In a process of its own, which a kernel that reads there ends."""
    command, root = [sys.executable, "-c", WITHOUT_MEMORY], Path(__file__).parent.parent
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"exit status {run.returncode}: {run.stderr}"


@needs_native
@every_dtype
@pytest.mark.parametrize("shape", [(33, 65, 41), (3, 301, 67), (2, 5, 3)], ids=str)
def test_same_bits_for_any_number_of_threads(shape, dtype):
    runs, before = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            runs.append(all_orders(*build(shape, dtype), with_implementation("native"), 2))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.fixture
def poisoned():
    """What a kernel has not written yet is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@needs_native
@every_dtype
@every_shape
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_is_written(shape, layout, dtype, poisoned):
    z, y = build(shape, dtype, layout=layout)
    loss, p, residual = raw(z.detach(), y)
    v = arrange(torch.randn(shape).to(dtype), layout)
    for x in (loss, p, residual, *raw(v, torch.ones_like(loss), p, residual)):
        assert x.isfinite().all()
    for x, d in zip(raw(v, loss, p, residual), raw(v.contiguous(), loss, p, residual), strict=True):
        assert torch.equal(x, d)
