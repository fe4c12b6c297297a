"""Properties that hold for any shapes, strides, dtypes and presence of operands."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastkfo.functional import kron_transform, kron_update
from tests.cases import (
    IMPLEMENTATIONS,
    Case,
    Item,
    operands,
)
from tests.dense import (
    assert_near,
    dense_transform,
    dense_update,
    derivatives,
    magnitudes,
)

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
LAYOUTS = ("contiguous", "transposed", "gaps", "expanded", "channels_last", "offset")
sizes = st.integers(0, 7)


@st.composite
def items(draw):
    tasks = draw(st.none() | st.integers(0, 4))
    batch = draw(st.lists(st.integers(0, 5), max_size=2))
    n, m = draw(sizes), draw(sizes)
    kinds = st.sampled_from([None, "shared"] if tasks is None else [None, "shared", "tasks"])
    left, right, bias = draw(kinds), draw(kinds), draw(kinds)
    if tasks is not None and "tasks" not in (left, right, bias):
        left = "tasks"
    shape = (*([] if tasks is None else [tasks]), *batch, n, m)
    broadcast = tuple(size if draw(st.booleans()) else 1 for size in shape)
    scale = draw(st.sampled_from([None, (), shape, shape[-1:], broadcast]))
    param = draw(st.sampled_from([None, shape[-2:], broadcast]))
    return Item(shape, left, right, bias, scale, tasks, None, param, draw(st.sampled_from(LAYOUTS)))


@st.composite
def cases(draw):
    psd = draw(st.booleans())
    several = draw(st.lists(items(), min_size=1, max_size=4))
    if psd:
        several = [dataclasses.replace(x, rows=draw(st.none() | sizes)) for x in several]
    lr = draw(st.sampled_from(["float", "scalar", "elementwise", "list"]))
    return Case("any", tuple(several), psd, lr)


@every_implementation
@given(case=cases(), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_any_case(implementation, case, dtype):
    """Value and both derivatives; in lower precision, within its rounding of the summands."""
    x = operands(case, dtype)
    order = 1 if dtype == torch.bfloat16 else 2
    leaves, dense = x.leaves(), x.dense().leaves()
    out, expected = (
        leaves.update(kron_update, implementation=implementation),
        dense.update(dense_update),
    )
    actual = [*out, *derivatives(out, leaves.tensors(), order)]
    wanted = [*expected, *derivatives(expected, dense.tensors(), order)]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4 * 2.0**-8}[dtype]
    for k, (a, e, scale) in enumerate(zip(actual, wanted, magnitudes(x, order), strict=True)):
        assert a.dtype == dtype
        assert_near(a, e, tolerance, f"[{k}]", scale)


@every_implementation
@given(case=cases())
def test_a_call_of_many_items_is_many_calls(implementation, case):
    """Neither neighbours nor their order change an item, not in a bit."""
    x = operands(case)
    together = x.transform(kron_transform, implementation=implementation)
    names = ("grads", "left", "right", "bias", "scale")
    for i, u in enumerate(together):
        one = [[x.lists[name][i]] for name in names]
        (alone,) = kron_transform(*one, psd=case.psd, implementation=implementation)
        assert torch.equal(u, alone)


@every_implementation
@given(case=cases(), seed=st.integers(0, 9))
def test_linear_in_every_operand(implementation, case, seed):
    """`U` is affine in G and β, linear in S, and without psd affine in A and in C."""
    case = dataclasses.replace(case, lr="float")
    x, y = operands(case, seed=seed), operands(case, seed=seed + 100)
    names = ("grads", "bias", "scale") + (() if case.psd else ("left", "right"))

    def transform(lists):
        ordered = [lists[name] for name in ("grads", "left", "right", "bias", "scale")]
        return kron_transform(*ordered, psd=case.psd, implementation=implementation)

    for name in names:
        mixed = [
            None if a is None else 0.75 * a + 0.25 * b
            for a, b in zip(x.lists[name], y.lists[name], strict=True)
        ]
        u = transform(x.lists)
        v = transform({**x.lists, name: y.lists[name]})
        w = transform({**x.lists, name: mixed})
        for a, b, c in zip(u, v, w, strict=True):
            # "expanded" operands stay expanded: both seeds repeat the same axis
            assert_near(c, 0.75 * a + 0.25 * b, 1e-10, name, scale=a.abs() + b.abs())


@every_implementation
@given(case=cases())
def test_vjp_is_the_transpose(implementation, case):
    """`⟨V, U(G) − U(0)⟩ = ⟨∂U/∂Gᵀ V, G⟩`, U being affine in G."""
    x = operands(case)
    grads = [g.detach().requires_grad_() for g in x.lists["grads"]]
    rest = [x.lists[name] for name in ("left", "right", "bias", "scale")]

    def transform(g):
        return kron_transform(g, *rest, psd=case.psd, implementation=implementation)

    out = transform(grads)
    base = transform([torch.zeros_like(g) for g in grads])
    v = [torch.randn_like(u) for u in out]
    pulled = torch.autograd.grad(out, grads, v)
    for k in range(len(grads)):
        forward = (v[k] * (out[k] - base[k])).sum()
        backward = (pulled[k] * grads[k]).sum()
        size = (v[k].abs() * (out[k].abs() + base[k].abs())).sum()
        assert_near(backward.detach(), forward.detach(), 1e-10, scale=size.detach())


@every_implementation
@given(n=sizes, m=sizes, batch=st.integers(0, 4), psd=st.booleans())
def test_identities_change_nothing(implementation, n, m, batch, psd):
    """An absent operand is the identity, zero or one that it stands for, to the last bit."""
    g = torch.randn(batch, n, m).double()
    a, c = torch.eye(n).double(), torch.eye(m).double()
    b, s = torch.zeros(n, m).double(), torch.ones(()).double()
    (u,) = kron_transform([g], [a], [c], [b], [s], psd=psd, implementation=implementation)
    assert torch.equal(u, g)
    (v,) = kron_transform([g], implementation=implementation)
    assert torch.equal(v, g)
    (w,) = kron_update([g], [g], [a], None, [b], lr=1.0, psd=psd, implementation=implementation)
    assert torch.equal(w, torch.zeros_like(g))


@every_implementation
@given(case=cases(), layout=st.sampled_from(LAYOUTS[1:]))
def test_strides_do_not_matter(implementation, case, layout):
    """The values of any layout, copied without gaps, give the same result."""
    laid_out = tuple(dataclasses.replace(item, layout=layout) for item in case.items)
    x = operands(dataclasses.replace(case, items=laid_out))
    plain = x.map(lambda t: t.detach().clone(memory_format=torch.contiguous_format))
    a = x.update(kron_update, implementation=implementation)
    b = plain.update(kron_update, implementation=implementation)
    scales = x.dense().transform(dense_transform)
    for u, v, scale in zip(a, b, scales, strict=True):
        assert_near(u, v, 1e-12, layout, scale=v.abs() + scale.abs())
