"""gram against `LᵀL` written as an einsum in float64, to any order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

from fastkfo.functional import gram
from tests.cases import (
    GRAM_SHAPES,
    IMPLEMENTATIONS,
    lay_out,
    skip_unless_available,
)
from tests.dense import (
    assert_near,
    derivatives,
)

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_shape = pytest.mark.parametrize("shapes", GRAM_SHAPES.values(), ids=GRAM_SHAPES)
LAYOUTS = ("contiguous", "transposed", "gaps", "expanded", "channels_last", "offset")


def dense(factors):
    return [torch.einsum("...ri,...rj->...ij", x, x) for x in factors]


def build(shapes, dtype=torch.float64, device="cpu", layout="contiguous"):
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(s, generator=generator).bfloat16().to(dtype).to(device) for s in shapes]
    return [lay_out(x, layout).detach().requires_grad_() for x in exact]


def compare(actual, expected, tolerance=1e-10):
    assert len(actual) == len(expected)
    for k, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert_near(x, y, tolerance, f"[{k}]")


def all_orders(factors, op, order):
    out = op(factors)
    return [*out, *derivatives(out, factors, order)]


@every_implementation
@every_shape
@pytest.mark.parametrize("layout", LAYOUTS)
def test_value_and_gradients(shapes, layout, implementation, device):
    skip_unless_available(implementation, device)
    order = 1 if max(torch.Size(s).numel() for s in shapes) > 10_000 else 3

    def op(factors):
        return gram(factors, implementation=implementation)

    actual = all_orders(build(shapes, device=device, layout=layout), op, order)
    compare(actual, all_orders(build(shapes, device=device, layout=layout), dense, order))


@every_implementation
@pytest.mark.parametrize("name", ["square", "ragged", "empty"])
def test_gradcheck(name, implementation):
    factors = build(GRAM_SHAPES[name])

    def op(*factors):
        return tuple(gram(list(factors), implementation=implementation))

    assert torch.autograd.gradcheck(op, factors)
    assert torch.autograd.gradgradcheck(op, factors)


@every_implementation
def test_results_are_symmetric(implementation):
    for square in gram(build([(9, 7), (4, 5, 6)], torch.float32), implementation=implementation):
        assert_near(square.mT, square, 1e-6)
        assert (square.diagonal(dim1=-2, dim2=-1) >= 0).all()


@every_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_once(dtype, implementation):
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    factors = build(GRAM_SHAPES["ragged"] + GRAM_SHAPES["wide"], dtype)
    out = gram(factors, implementation=implementation)
    for actual, expected in zip(out, dense([x.double() for x in factors]), strict=True):
        assert actual.dtype == dtype
        assert_near(actual, expected, 1.01 * unit)


@every_implementation
@every_shape
def test_float32_is_as_exact_as_plain_float32(shapes, implementation):
    factors = build(shapes, torch.float32)
    ours = all_orders(factors, lambda x: gram(x, implementation=implementation), 2)
    plain = all_orders(factors, dense, 2)
    exact = all_orders([x.detach().double().requires_grad_() for x in factors], dense, 2)
    longest = max(max(s[-2:]) for s in shapes)
    floor = 8 * torch.finfo(torch.float32).eps * max(1, longest) ** 0.5
    for u, p, e in zip(ours, plain, exact, strict=True):
        error, allowed = (u.double() - e).norm(), (p.double() - e).norm()
        assert error <= max(2 * allowed, floor * e.norm())


@every_implementation
def test_mixed_dtypes_and_no_factors(implementation):
    assert gram([], implementation=implementation) == []
    factors = [torch.randn(3, 2), torch.randn(4, 4).double(), torch.randn(2, 3)]
    out = gram(factors, implementation=implementation)
    assert [x.dtype for x in out] == [x.dtype for x in factors]
    compare(out, dense(factors), 1e-6)


@every_implementation
def test_unused_outputs_and_factors_without_gradients(implementation):
    a, b, c = build([(3, 2), (3, 2), (4, 4)])
    b.requires_grad_(False)
    first, second, _ = gram([a, b, c], implementation=implementation)
    (first.sum() + second.sum()).backward()
    assert_near(a.grad, 2 * a @ torch.ones(2, 2, dtype=a.dtype), 1e-12)
    assert b.grad is None
    assert c.grad is None


@every_implementation
@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 2), (2, 0), (-1, -2)])
def test_vmap(in_dims, implementation):
    a, b = torch.randn(4, 3, 5).double(), torch.randn(2, 6, 3).double()
    size = 4
    a, b = (
        x if d is None else torch.stack([(k + 1) * x for k in range(size)], d)
        for x, d in zip((a, b), in_dims, strict=True)
    )

    def op(x, y):
        return tuple(gram([x, y], implementation=implementation))

    def loss(f):
        return lambda x, y: sum(u.square().sum() for u in f(x, y))

    def oracle(x, y):
        return tuple(dense([x, y]))

    for make in (
        lambda f: f,
        lambda f: grad(loss(f), (0, 1)),
        lambda f: grad(lambda *t: sum(d.square().sum() for d in grad(loss(f), (0, 1))(*t)), (0, 1)),
    ):
        actual = vmap(make(op), in_dims)(a, b)

        def row(k):
            return [
                x if d is None else x.select(d, k) for x, d in zip((a, b), in_dims, strict=True)
            ]

        rows = [make(oracle)(*row(k)) for k in range(size)]
        compare(actual, [torch.stack(one) for one in zip(*rows, strict=True)])


@every_implementation
def test_nested_vmap(implementation):
    x = torch.randn(2, 3, 4, 5).double()

    def op(x):
        return gram([x], implementation=implementation)[0]

    compare([vmap(vmap(op, 1), 1)(x)], [dense([x.permute(1, 2, 0, 3)])[0]])


@every_implementation
def test_arguments_are_unchanged(implementation):
    factors = build(GRAM_SHAPES["ragged"], layout="gaps")
    before = [x.detach().clone() for x in factors]
    all_orders(factors, lambda x: gram(x, implementation=implementation), 3)
    assert all(torch.equal(x, y) for x, y in zip(factors, before, strict=True))


@every_implementation
def test_compile_without_graph_breaks(implementation):
    torch.compiler.reset()

    def loss(*factors):
        out = gram(list(factors), implementation=implementation)
        return sum(x.square().sum() for x in out)

    factors = build(GRAM_SHAPES["ragged"])
    eager = torch.autograd.grad(loss(*factors), factors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compare(torch.autograd.grad(compiled(*factors), factors), eager, 1e-12)


@every_implementation
@given(
    shapes=st.lists(st.lists(st.integers(0, 6), min_size=2, max_size=4), min_size=1, max_size=4),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_shape(implementation, shapes, layout, dtype):
    """Also `gram(QL) = gram(L)` for an orthogonal Q, here a permutation of the rows."""
    factors = build(shapes, dtype, layout=layout)
    out = gram(factors, implementation=implementation)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    compare(out, dense([x.double() for x in factors]), tolerance)
    permuted = [x.detach()[..., torch.randperm(x.shape[-2]), :] for x in factors]
    compare(gram(permuted, implementation=implementation), out, tolerance)
