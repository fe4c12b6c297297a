"""The ops of convolutional learners against PyTorch's own, task after task, to any order."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap

from fastkfo.functional import batch_norm, max_pool2d
from fastkfo.kernels import selector
from tests.cases import needs_native
from tests.dense import assert_near, derivatives
from tests.layer_cases import LAYERS

every_layer = pytest.mark.parametrize("case", LAYERS, ids=str)
small_layers = pytest.mark.parametrize("case", [c for c in LAYERS if c.small], ids=str)
full_layers = pytest.mark.parametrize(
    "case", [c for c in LAYERS if 0 not in c.shapes[0][:2]], ids=str
)


@pytest.fixture(params=["native", "triton", "reference"])
def implementation(request, device):
    """Those that run on the device."""
    op = "layers" if request.param == "triton" else ""
    why = selector.unavailable(request.param, device.type, op)
    if why:
        pytest.skip(why)
    return request.param


def present(operands):
    return [x for x in operands if x is not None]


def all_orders(output, operands, order):
    return [output, *derivatives([output], present(operands), order)]


@every_layer
def test_value_and_derivatives(case, implementation, device):
    if case.op == "layer_norm" and implementation == "triton":
        pytest.skip("no Triton kernel")
    ours, theirs = case.operands(device=device), case.operands(device=device)
    got = case.run(ours, implementation)
    assert got.dtype == torch.float64
    if len(ours[0]) == 0:  # nothing to stack
        assert got.shape[0] == 0
        assert all(g.numel() == 0 for g in derivatives([got], present(ours), 2))
        return
    want = case.oracle(theirs)
    for k, (a, b) in enumerate(
        zip(all_orders(got, ours, 2), all_orders(want, theirs, 2), strict=True)
    ):
        assert_near(a, b, 1e-10, f"[{k}]")


@full_layers
def test_third_derivatives(case, implementation, device):
    """Against the formula: PyTorch's own of a native batch norm are wrong."""
    if implementation == "reference" or (case.op, implementation) == ("layer_norm", "triton"):
        pytest.skip("nothing to compare")
    ours, theirs = case.operands(device=device), case.operands(device=device)
    got = all_orders(case.run(ours, implementation).sin(), ours, 3)
    want = all_orders(case.run(theirs, "reference").sin(), theirs, 3)
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_near(a, b, 1e-9, f"[{k}]")


@needs_native
@small_layers
def test_finite_differences(case):
    operands = case.operands()

    def op(*given):
        filled = iter(given)
        return case.run([None if x is None else next(filled) for x in operands])

    assert gradcheck(op, present(operands))
    assert gradgradcheck(op, present(operands))


@needs_native
@full_layers
def test_vmap(case):
    """An axis more, in any place, of some operands or of all."""
    operands = case.operands()
    more = [None if x is None else torch.stack([x, 2 * x + 1], 1) for x in operands]
    dims = [None if x is None else 1 for x in operands]
    got = vmap(lambda *given: case.run(list(given)), tuple(dims))(*more)
    for k in range(2):
        want = case.run([None if x is None else x.select(1, k) for x in more])
        assert_near(got[k], want, 1e-12)
    first = torch.stack([operands[0], operands[0] + 1])
    got = vmap(lambda x: case.run([x, *operands[1:]]))(first)
    for k in range(2):
        assert_near(got[k], case.run([first[k], *operands[1:]]), 1e-12)


@needs_native
@small_layers
def test_vmap_of_grad(case):
    operands = [None if x is None else x.detach() for x in case.operands()]

    def gradient(x):
        return grad(lambda x: case.run([x, *operands[1:]]).sin().sum())(x)

    batch = torch.stack([operands[0], operands[0] - 1])
    got = vmap(gradient)(batch)
    for k in range(2):
        x = batch[k].clone().requires_grad_()
        want = torch.autograd.grad(case.run([x, *operands[1:]]).sin().sum(), x)[0]
        assert_near(got[k], want, 1e-12)


@full_layers
def test_float32(case, implementation, device):
    """Twice the plain op's own error, or what summing costs."""
    if case.op == "layer_norm" and implementation == "triton":
        pytest.skip("no Triton kernel")
    exact = case.operands(device=device)
    want = all_orders(case.oracle(exact), exact, 2)
    ours = case.operands(torch.float32, device)
    theirs = case.operands(torch.float32, device)
    got = all_orders(case.run(ours, implementation), ours, 2)
    plain = all_orders(case.oracle(theirs), theirs, 2)
    for k, (a, b, c) in enumerate(zip(got, want, plain, strict=True)):
        own = (c.double() - b).norm() / b.norm().clamp(min=1e-3)
        assert_near(a, b, max(2 * own.item(), 2e-6), f"[{k}]")


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in LAYERS if c.small and c.op != "linear"], ids=str)
def test_half_precision_is_summed_in_float32(case, dtype):
    """Values and first derivatives are those of float32, rounded once; weights may be float32."""
    half, wide = case.operands(dtype), case.operands(torch.float32)
    if case.op.endswith("norm"):
        half[1:] = wide[1:]
    got, want = case.run(half), case.run(wide)
    assert got.dtype == dtype
    cotangent = torch.randn_like(want).to(dtype).requires_grad_()
    ours = torch.autograd.grad(got, present(half), cotangent, create_graph=True)
    theirs = torch.autograd.grad(want, present(wide), cotangent.float(), create_graph=True)
    eps = torch.finfo(dtype).eps
    for x, a, b in zip([half[0], *present(half)], (got, *ours), (want, *theirs), strict=True):
        assert a.dtype == x.dtype
        assert_near(a.float(), b, eps)
    total = sum(g.float().square().sum() for g in ours)
    second = torch.autograd.grad(total, [*present(half), cotangent], materialize_grads=True)
    assert all(g.isfinite().all() for g in second)


@needs_native
@full_layers
def test_a_nan_stays_in_its_task(case):
    operands = case.operands(torch.float32)
    if len(operands[0]) < 2:
        pytest.skip("one task")

    def results(values):
        values = [None if v is None else v.detach().clone().requires_grad_() for v in values]
        y = case.run(values)
        first = torch.autograd.grad(y.square().sum(), present(values), create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in first), present(values))
        return [x[1:].detach() for x in (y, *first, *second)]

    clean = results(operands)
    with torch.no_grad():
        operands[0] = operands[0].clone()
        operands[0][0] = torch.nan
    for a, b in zip(results(operands), clean, strict=True):
        assert torch.equal(a, b)


@needs_native
@full_layers
def test_bitwise_the_same_for_any_number_of_threads(case):
    def results():
        operands = case.operands(torch.float32)
        y = case.run(operands)
        first = torch.autograd.grad(y.square().sum(), present(operands), create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in first), present(operands))
        return [y, *first, *second]

    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(results())
    finally:
        torch.set_num_threads(threads)
    if case.op == "linear":
        pytest.skip("the product is BLAS's")
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@needs_native
@pytest.mark.parametrize("op", ["batch_norm", "layer_norm"])
def test_hessian_by_reverse_mode(op):
    case = next(c for c in LAYERS if c.small and c.op == op)
    x, *rest = [v.detach() for v in case.operands()]

    def f(x):
        return case.run([x, *rest]).sin().sum()

    got = torch.func.jacrev(torch.func.grad(f))(x)
    want = torch.autograd.functional.hessian(f, x)
    assert_near(got, want, 1e-10)


@needs_native
def test_small_variances():
    x = 1 + 1e-4 * torch.randn(2, 50, 3)
    for values in (x, torch.ones_like(x)):
        var = batch_norm(values, eps=1e-3).var
        assert_near(var, values.double().var(1, correction=0), 1e-5)
        assert (var >= 0).all()


@needs_native
def test_a_window_without_pixels():
    x = torch.randn(1, 1, 1, 2, 2, requires_grad=True)
    y = max_pool2d(x, 2, padding=1, dilation=3)
    want = torch.nn.functional.max_pool2d(x[0], 2, 2, 1, 3)
    assert torch.equal(y[0], want)
    assert not torch.autograd.grad(y.sum(), x)[0].any()
