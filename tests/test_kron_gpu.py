"""The Kronecker update's CUDA kernels on a GPU: the grid, and what only a GPU shows."""

from contextlib import contextmanager

import pytest
import torch

from fastkfo.functional import gram, kron_transform, kron_update
from tests import test_gram, test_kron
from tests.cases import CASES, GRAM_SHAPES, operands, skip_unless_available
from tests.dense import worst

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


@contextmanager
def tf32(allowed):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


FLOAT32 = [x for x in CASES if x.name in ("operands_lrbs", "ragged", "tasks_all", "chunks_tasks")]


@pytest.mark.parametrize("allowed", [False, True], ids=["exactly", "tf32"])
@pytest.mark.parametrize("case", FLOAT32, ids=str)
def test_float32_and_its_derivatives(case, allowed):
    x = operands(case, torch.float32, CUDA)
    with tf32(allowed):
        error = worst(kron_update, x, implementation="native")
    assert 1e-6 < error < 2**-9 if allowed else error < 3e-6


@pytest.mark.parametrize("allowed", [False, True], ids=["exactly", "tf32"])
def test_squares_in_float32(allowed):
    factors = test_gram.build([(40, 33), (3, 20, 65)], torch.float32, "cuda")
    exact = [x.detach().double().requires_grad_() for x in factors]
    with tf32(allowed):
        ours = test_gram.all_orders(factors, lambda x: gram(x, implementation="native"), 3)
    for a, b in zip(ours, test_gram.all_orders(exact, test_gram.dense, 3), strict=True):
        assert (a.double() - b).norm() <= (2**-9 if allowed else 2e-6) * b.norm()


def crowded(dtype):
    """More units than blocks, more items than a launch holds, parts of many tasks."""
    torch.manual_seed(0)
    g = [torch.randn(60, 40, 12, 9) if k % 8 == 0 else torch.randn(60, 2, 5, 7) for k in range(40)]
    left = [torch.randn(x.shape[2], x.shape[2]) for x in g]
    right = [torch.randn(60, x.shape[3], x.shape[3]) for x in g]
    return [[x.to(CUDA, dtype).requires_grad_() for x in group] for group in (g, left, right)]


@pytest.mark.parametrize("stream", [False, True])
def test_more_units_than_blocks(stream):
    groups = crowded(torch.float64)
    tensors = [x for group in groups for x in group]
    found = []
    with torch.cuda.stream(torch.cuda.Stream() if stream else None):
        for how in ("native", "reference"):
            out = kron_transform(*groups, implementation=how)
            first = torch.autograd.grad(
                sum([x.sin().sum() for x in out]), tensors, create_graph=True
            )
            second = torch.autograd.grad(sum([x.cos().sum() for x in first]), tensors)
            found.append([*out, *first, *second])
        torch.cuda.current_stream().synchronize()
    test_kron.compare(*found)


def test_it_compiles():
    g, left = torch.randn(4, 3, 5, device="cuda"), torch.randn(3, 3, device="cuda")

    def step(g, left):
        return kron_transform([g], [left], implementation="native")[0]

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(g, left), left @ g)


def test_large_items_go_to_cublas_and_small_ones_do_not():
    g = [torch.randn(300, 30, device="cuda"), torch.randn(20, 30, device="cuda")]
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
