"""The Kronecker ops under torch.func's transforms, torch.compile and fake tensors.

The oracle of vmap is a loop, and that of gradients the dense formula under plain autograd.
"""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vjp, vmap

from fastkfo.functional import kron_transform, kron_update
from tests.cases import (
    HAS_NATIVE,
    IMPLEMENTATIONS,
    SMALL,
    operands,
)
from tests.dense import (
    assert_near,
    dense_update,
    derivatives,
)

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
SIZE = 3  # of the mapped axis
CASES = {
    case.name: case
    for case in SMALL
    if case.name
    in (
        "operands_none",
        "operands_ls",
        "operands_lrbs",
        "conv_8x3x3x3",
        "ragged",
        "psd_wide",
        "tasks_all",
        "tasks_right",
        "tasks_no_axis_in_grad",
        "tasks_shared_param",
        "scale_row",
        "scale_one",
        "lr_scalar",
        "empty_n",
        "empty_batch",
        "empty_tasks",
    )
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=str)


def mapped(case, pattern):
    """Operands, some of which get a mapped axis; pattern(k) is where, or None for no such axis."""
    x = operands(case)
    generator = torch.Generator().manual_seed(7)
    tensors, dims = [], []
    for k, t in enumerate(x.tensors()):
        dim = pattern(k)
        if dim is not None:
            dim = min(dim, t.dim())
            noise = torch.rand((SIZE, *t.shape), generator=generator, dtype=t.dtype) + 0.5
            t = (t * noise).movedim(0, dim)
        tensors.append(t)
        dims.append(dim)
    if all(dim is None for dim in dims):
        tensors[0], dims[0] = tensors[0].expand(SIZE, *tensors[0].shape), 0
    return x, tensors, tuple(dims)


PATTERNS = {
    "all_first": lambda k: 0,
    "all_second": lambda k: 1,
    "even": lambda k: 0 if k % 2 == 0 else None,
    "odd_last": lambda k: 9 if k % 2 else None,
    "one": lambda k: 0 if k == 1 else None,
}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


def function_of(x, op, **options):
    """The op as a function of a flat list of tensors."""

    def run(*tensors):
        given = iter(tensors)
        return tuple(x.map(lambda _: next(given)).update(op, **options))

    return run


def scalar_of(x, op, **options):
    run = function_of(x, op, **options)
    return lambda *tensors: sum((u * u.detach().cos()).square().sum() for u in run(*tensors))


def rows(tensors, dims, k):
    return [t if d is None else t.select(d, k) for t, d in zip(tensors, dims, strict=True)]


def looped(f, tensors, dims):
    results = [f(*rows(tensors, dims, k)) for k in range(SIZE)]
    return [torch.stack(one) for one in zip(*results, strict=True)]


def compare(actual, expected, tolerance=1e-10):
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected)
    for k, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert_near(x, y, tolerance, f"[{k}]")


@every_implementation
@every_pattern
@every_case
def test_vmap(case, pattern, implementation):
    x, tensors, dims = mapped(case, pattern)
    run = function_of(x, kron_update, implementation=implementation)
    compare(vmap(run, dims)(*tensors), looped(function_of(x, dense_update), tensors, dims))


@every_implementation
@every_pattern
@every_case
def test_vmap_of_grad(case, pattern, implementation):
    x, tensors, dims = mapped(case, pattern)
    every = tuple(range(len(tensors)))
    actual = vmap(grad(scalar_of(x, kron_update, implementation=implementation), every), dims)
    expected = looped(grad(scalar_of(x, dense_update), every), tensors, dims)
    compare(actual(*tensors), expected)


@every_implementation
@pytest.mark.parametrize("pattern", ["all_second", "even"])
@pytest.mark.parametrize("name", ["operands_lrbs", "psd_wide", "scale_one", "tasks_all", "ragged"])
def test_autograd_through_vmap(name, pattern, implementation):
    """A forward under vmap, with plain autograd outside it, to third order."""
    x, tensors, dims = mapped(CASES[name], PATTERNS[pattern])
    run = vmap(function_of(x, kron_update, implementation=implementation), dims)

    def both(f):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        return derivatives(list(f(*leaves)), leaves, 3)

    dense = function_of(x, dense_update)
    compare(both(run), both(lambda *t: looped(dense, t, dims)))


@every_implementation
@pytest.mark.parametrize("name", ["operands_lrbs", "psd_wide", "scale_one", "tasks_all"])
def test_nested_vmap(name, implementation):
    x, inner, dims = mapped(CASES[name], PATTERNS["even"])
    outer = [torch.stack([t, 2 * t]) if k % 3 else t for k, t in enumerate(inner)]
    outer_dims = tuple(0 if k % 3 else None for k in range(len(inner)))
    run = function_of(x, kron_update, implementation=implementation)
    actual = vmap(vmap(run, dims), outer_dims)(*outer)
    dense = function_of(x, dense_update)
    expected = [looped(dense, rows(outer, outer_dims, k), dims) for k in range(2)]
    compare(actual, [torch.stack(one) for one in zip(*expected, strict=True)])


@every_implementation
@pytest.mark.parametrize("name", ["operands_lrbs", "psd_wide", "tasks_shared_param", "scale_one"])
def test_grad_of_grad_under_vmap(name, implementation):
    x, tensors, dims = mapped(CASES[name], PATTERNS["even"])
    every = tuple(range(len(tensors)))

    def penalty(op, **options):
        first = grad(scalar_of(x, op, **options), every)
        return grad(lambda *t: sum(d.square().sum() for d in first(*t)), every)

    actual = vmap(penalty(kron_update, implementation=implementation), dims)(*tensors)
    compare(actual, looped(penalty(dense_update), tensors, dims))


@every_implementation
@pytest.mark.parametrize("name", ["operands_lrbs", "scale_row", "ragged"])
def test_vmap_over_cotangents(name, implementation):
    """As `jacrev` and `is_grads_batched` do: everything but the cotangent is shared."""
    x = operands(CASES[name])
    tensors = x.tensors()

    def pulled(op, **options):
        out, pull = vjp(function_of(x, op, **options), *tensors)
        generator = torch.Generator().manual_seed(2)
        v = [torch.randn((SIZE, *u.shape), generator=generator, dtype=u.dtype) for u in out]
        return vmap(lambda *c: pull(tuple(c)))(*v)

    compare(pulled(kron_update, implementation=implementation), pulled(dense_update))


@pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(x, marks=pytest.mark.xfail(reason="no rule for autograd's own, older vmap"))
        if x == "native"
        else x
        for x in IMPLEMENTATIONS
    ],
)
def test_batched_gradients_of_plain_autograd(implementation):
    g, a = (torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (u,) = kron_transform([g], [a], psd=True, implementation=implementation)
    v = torch.randn(4, 3, 3, dtype=torch.float64)
    batched = torch.autograd.grad(u, (g, a), v, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(u, (g, a), row, retain_graph=True) for row in v]
    compare(batched, [torch.stack(one) for one in zip(*one_by_one, strict=True)], 1e-12)


@every_implementation
def test_second_order_maml_under_vmap(implementation):
    """The use it is for: vmap over tasks of a meta-gradient through two inner steps."""
    torch.manual_seed(1)
    w, a, c, b = (
        torch.randn(s, dtype=torch.float64) * 0.5 for s in ((4, 3), (4, 4), (3, 3), (4, 3))
    )
    x, y = torch.randn(5, 6, 3, dtype=torch.float64), torch.randn(5, 6, 4, dtype=torch.float64)

    def meta_loss(op, options, w, a, c, b, x, y):
        def loss(w):
            return (torch.tanh(x @ w.mT) - y).square().mean()

        for _ in range(2):
            (w,) = op([w], [grad(loss)(w)], [a], [c], [b], [None], lr=0.3, psd=True, **options)
        return loss(w)

    def run(op, **options):
        return grad(lambda *t: meta_loss(op, options, *t), (0, 1, 2, 3))

    dims = (None,) * 4 + (0, 0)
    actual = vmap(run(kron_update, implementation=implementation), dims)(w, a, c, b, x, y)
    per_task = [run(dense_update)(w, a, c, b, x[t], y[t]) for t in range(5)]
    compare(actual, [torch.stack(one) for one in zip(*per_task, strict=True)])


@pytest.mark.skipif(not HAS_NATIVE, reason="fakes are of the native ops")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_fake_tensors(case):
    """Shapes, dtypes and strides without data are those of the real thing, to second order."""
    real = operands(case, torch.float32).leaves()
    mode = FakeTensorMode()
    fake = real.map(mode.from_tensor)

    def described(x):
        out = x.update(kron_update, implementation="native")
        seeds = [torch.ones_like(u, requires_grad=True) for u in out]
        options = {"allow_unused": True, "materialize_grads": True}
        first = torch.autograd.grad(out, x.tensors(), seeds, create_graph=True, **options)
        total = sum(d.square().sum() for d in first)
        second = torch.autograd.grad(total, [*x.tensors(), *seeds], **options)
        return [(tuple(t.shape), t.dtype) for t in itertools.chain(out, first, second)]

    with mode:
        pretended = described(fake)
    assert pretended == described(real)


@pytest.mark.slow
@every_implementation
@pytest.mark.parametrize("name", ["operands_lrbs", "psd_wide", "lr_scalar", "ragged"])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compile_without_graph_breaks(name, implementation):
    """Forward and first-order backward. Second order is eager: torch.compile has none."""
    torch.compiler.reset()
    x = operands(CASES[name])
    run = function_of(x, kron_update, implementation=implementation)

    def both(f):
        leaves = [t.detach().clone().requires_grad_() for t in x.tensors()]
        out = f(*leaves)
        received = torch.autograd.grad([u.square().sum() for u in out], leaves, allow_unused=True)
        return [*out, *(d for d in received if d is not None)]

    eager = both(run)  # also makes the choice of an implementation, which loads the library
    compare(both(torch.compile(run, fullgraph=True, backend="aot_eager")), eager, 1e-12)
