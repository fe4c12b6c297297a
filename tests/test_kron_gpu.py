"""The Kronecker update's CUDA kernels on a GPU: the grid, and what only a GPU shows."""

import pytest
import torch

from fastkfo.functional import gram, kron_transform, kron_update
from tests import test_gram, test_kron
from tests.cases import CASES, GRAM_SHAPES, operands, skip_unless_available
from tests.dense import dense_update

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _native():
    skip_unless_available("native", CUDA)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_derivatives(case):
    test_kron.derivatives_agree(case, "native", CUDA, order=1 if case.heavy else 2)


@pytest.mark.parametrize("shapes", GRAM_SHAPES.values(), ids=GRAM_SHAPES)
def test_squares(shapes):
    order = 1 if max(torch.Size(s).numel() for s in shapes) > 10_000 else 3
    factors = test_gram.build(shapes, device="cuda")
    ours = test_gram.all_orders(factors, lambda x: gram(x, implementation="native"), order)
    test_gram.compare(ours, test_gram.all_orders(factors, test_gram.dense, order))


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_only_where_pytorch_allows_it(tf32):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        x = operands(next(x for x in CASES if x.name == "chunks_tasks"), torch.float32, CUDA)
        out = x.update(kron_update, implementation="native")
    finally:
        matmul.fp32_precision = before
    exact = x.dense().update(dense_update)
    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(out, exact, strict=True))
    assert 1e-5 < error < 2e-3 if tf32 else error < 2e-6


def test_large_factors_go_to_cublas_and_small_ones_do_not():
    g = [torch.randn(300, 300, device="cuda"), torch.randn(20, 30, device="cuda")]
    left = [torch.randn(len(x), len(x), device="cuda", requires_grad=True) for x in g]
    out = kron_transform(g, left, implementation="native")
    for u, x, a in zip(out, g, left, strict=True):
        torch.testing.assert_close(u, a @ x, rtol=1e-4, atol=1e-4)
    assert ["KronForward" in x.grad_fn.name() for x in out] == [False, True]
    grads = torch.autograd.grad([u.sum() for u in out], left)
    want = torch.autograd.grad(sum((a @ x).sum() for a, x in zip(left, g, strict=True)), left)
    for a, b in zip(grads, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_it_is_bitwise_repeatable_and_waits_for_nothing():
    case = next(x for x in CASES if x.name == "chunks_tasks")
    x = operands(case, torch.float32, CUDA).leaves()

    def once():
        out = x.update(kron_update, implementation="native")
        return [*out, *torch.autograd.grad([y.sum() for y in out], x.tensors())]

    once()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [once(), once()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_it_can_be_recorded():
    g, left = torch.randn(4, 8, 16, 9, device="cuda"), torch.randn(16, 16, device="cuda")

    def step():
        return kron_transform([g], [left], psd=True, implementation="native")[0]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    g.normal_()
    graph.replay()
    torch.testing.assert_close(out, step())


def test_operands_on_two_devices_are_refused():
    g = torch.randn(3, 4, device="cuda")
    with pytest.raises(ValueError, match=r"left.*(cuda.*cpu|cpu.*cuda)"):
        kron_transform([g], [torch.eye(3)], implementation="native")
