"""What is not finite in one task stays out of what tasks share."""

import pytest
import torch

from fastkfo.inner_loop.containment import Contained, finite_rows, guard, select_rows, spread
from tests.dense import assert_near, derivatives

T = 4
NAN, INF = float("nan"), float("inf")
BAD = {"nan": NAN, "inf": INF, "minus_inf": -INF}
every_bad = pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def with_bad(bad, row, *shape, dtype=torch.float64):
    x = torch.randn(T, *shape).to(dtype)
    x.view(T, -1)[row, -1] = bad
    return x


def verdict(tensors, tasks=T):
    """`finite_rows` as a list; where it says None, all are."""
    rows = finite_rows(tensors, tasks)
    return [True] * tasks if rows is None else rows.tolist()


@every_bad
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", range(T))
def test_a_bad_row(bad, dtype, row):
    rows = finite_rows([torch.ones(T, 3, dtype=dtype), with_bad(bad, row, 2, 3, dtype=dtype)], T)
    assert rows.dtype == torch.bool
    assert rows.tolist() == [t != row for t in range(T)]


@every_bad
def test_bad_rows_of_several_tensors(bad, device):
    tensors = [with_bad(bad, 0, 5), None, torch.ones(T), with_bad(bad, 2, 3, 3).float()]
    tensors = [x if x is None else x.to(device) for x in tensors]
    assert verdict(tensors) == [False, True, False, True]


def test_numbers_per_task():
    assert verdict([torch.tensor([1.0, NAN, 3.0, -INF])]) == [True, False, True, False]


def test_all_finite_is_none_on_the_cpu():
    assert finite_rows([torch.randn(T, 3), torch.randn(T, 2, 2).double()], T) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_that_overflows_is_no_infinity(dtype, sign):
    """Every number is finite, the sum of their absolute values is not."""
    largest = torch.full((T, 9), sign * torch.finfo(dtype).max, dtype=dtype)
    assert verdict([largest]) == [True] * T
    largest[1, 4] = NAN
    assert verdict([largest]) == [True, False, True, True]


def test_smallest_numbers_are_finite():
    assert verdict([torch.full((T, 2), 1e-45), torch.zeros(T), -torch.zeros(T)]) == [True] * T


@pytest.mark.parametrize(
    "tensors",
    [[], [None], [torch.ones(T, 2).long()], [torch.ones(T).bool(), None]],
    ids=["nothing", "none", "integers", "bool_and_none"],
)
def test_nothing_that_could_be_bad(tensors):
    assert finite_rows(tensors, T) is None


def test_integers_beside_a_bad_tensor():
    tensors = [torch.ones(T, 2).long(), torch.tensor([1.0, 1.0, NAN, 1.0]), None]
    assert verdict(tensors) == [True, True, False, True]


def test_one_task():
    assert finite_rows([torch.ones(1, 3)], 1) is None
    assert verdict([torch.tensor([[1.0, NAN]])], 1) == [False]


def test_no_tasks_and_no_elements():
    assert finite_rows([torch.ones(0, 3)], 0) is None
    assert finite_rows([torch.ones(T, 0), torch.ones(T, 2)], T) is None


def test_no_elements_beside_a_bad_tensor():
    assert verdict([torch.ones(T, 0), with_bad(NAN, 1, 2)]) == [True, False, True, True]


def test_other_strides():
    x = with_bad(INF, 3, 2, 3)
    assert verdict([x.transpose(1, 2), x[:, :1]]) == [True, True, True, False]
    assert verdict([torch.tensor([1.0, NAN]).expand(T, 2)]) == [False] * T
    gaps = torch.full((T, 4), NAN)
    gaps[:, ::2] = 1.0
    assert verdict([gaps[:, ::2]]) == [True] * T


def test_rows_have_no_gradient():
    assert not finite_rows([with_bad(NAN, 0, 3).requires_grad_()], T).requires_grad


def test_select_rows():
    x = with_bad(NAN, 1, 2, 3).requires_grad_()
    out = select_rows(torch.tensor([True, False, True, True]), x, 0.0)
    assert torch.equal(out[[0, 2, 3]], x[[0, 2, 3]])
    assert torch.equal(out[1], torch.zeros(2, 3).double())
    (g,) = torch.autograd.grad(out.sum(), x)
    assert g.sum((1, 2)).tolist() == [6, 0, 6, 6]


# spread


def leaves(*shapes):
    return [torch.randn(s).double().requires_grad_() for s in shapes]


SHAPES = [(3,), (2, 3), (), (0, 2)]


def test_spread_gives_every_task_the_same():
    params = leaves(*SHAPES)
    for p, row in zip(params, spread(params, T), strict=True):
        assert row.shape == (T, *p.shape)
        assert torch.equal(row, p.expand(T, *p.shape))
        assert row.data_ptr() == p.data_ptr()  # no copy


@pytest.mark.parametrize("tasks", [1, 2, T])
def test_gradients_of_spread_are_those_of_expand(tasks):
    params = leaves(*SHAPES)
    factors = [torch.randn(tasks, *p.shape).double() for p in params]

    def three_orders(rows):
        out = [(r * f).sin() * f for r, f in zip(rows, factors, strict=True)]
        return derivatives(out, params, 3)

    expected = three_orders([p.expand(tasks, *p.shape) for p in params])
    for ours, theirs in zip(three_orders(spread(params, tasks)), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_gradgradcheck_of_spread():
    def op(x, y):
        rows = spread([x, y], 3)
        return (rows[0].exp() * rows[1].sum(1, keepdim=True)).sin()

    assert torch.autograd.gradcheck(op, leaves((2,), (3,)))
    assert torch.autograd.gradgradcheck(op, leaves((2,), (3,)))


@every_bad
@pytest.mark.parametrize("row", range(T))
def test_a_bad_row_of_a_cotangent_is_left_out(bad, row):
    params, factors = leaves((3,), (2, 3)), [with_bad(bad, row, 3), torch.randn(T, 2, 3).double()]
    rows = spread(params, T)
    grads = torch.autograd.grad(
        sum((r * f).sum() for r, f in zip(rows, factors, strict=True)), params
    )
    others = [t for t in range(T) if t != row]
    assert_near(grads[0], factors[0][others].sum(0), 1e-15)
    assert_near(grads[1], factors[1].sum(0), 1e-15)  # which had no bad row


@every_bad
def test_a_bad_row_is_left_out_of_second_derivatives(bad):
    (p,) = leaves((3,))
    factor = torch.rand(T, 3).double() + 1
    sick = factor.clone()
    sick[1, 2] = bad

    def second(factor):
        (row,) = spread([p], len(factor))
        (g,) = torch.autograd.grad((row * factor).pow(3).sum(), p, create_graph=True)
        return [g, *torch.autograd.grad(g.sum(), p)]

    for ours, without in zip(second(sick), second(factor[[0, 2, 3]]), strict=True):
        assert_near(ours, without, 1e-14)


def test_all_rows_bad_is_exactly_nothing():
    (p,) = leaves((3,))
    (row,) = spread([p], T)
    (g,) = torch.autograd.grad((row * NAN).sum(), p)
    assert torch.equal(g, torch.zeros(3).double())


def test_the_gradient_in_the_rows_is_what_it_is():
    (p,) = leaves((3,))
    (row,) = spread([p], T)
    (g,) = torch.autograd.grad((row * with_bad(NAN, 1, 3)).sum(), row)
    assert g[1].isnan().any()


def test_spread_of_what_has_no_gradient():
    rows = spread([torch.ones(2), torch.ones(2, 2).long()], T)
    assert [r.shape for r in rows] == [(T, 2), (T, 2, 2)]
    assert not any(r.requires_grad for r in rows)
    assert spread([], T) == []


def test_spread_without_gradients():
    params = leaves((2,), (2, 3))
    with torch.no_grad():
        rows = spread([params[0], params[1] * 1], T)
    assert [r.grad_fn for r in rows] == [None, None]
    assert all(torch.equal(r, p.expand(r.shape)) for r, p in zip(rows, params, strict=True))


# guard


def test_guard_of_a_node_with_several_results():
    """One of them is not used: no gradient comes for it."""
    (x,) = leaves((3, T, 2))
    parts = [*x.unbind(0)]
    guard(parts, T)
    factor = with_bad(INF, 2, 2)
    (g,) = torch.autograd.grad((parts[0] * factor).sum() + parts[1].sum(), x)
    assert g[0, [0, 1, 3]].equal(factor[[0, 1, 3]])
    assert not g[0, 2].any()
    assert g[1].sum(-1).tolist() == [2, 2, 0, 2]  # a task that is bad in one part is out of all
    assert not g[2].any()


def test_guard_of_leaves_and_without_gradients_does_nothing():
    (x,) = leaves((T, 2))
    guard([x, torch.ones(T)], T)
    (g,) = torch.autograd.grad((x * NAN).sum(), x)
    assert g.isnan().all()
    y = x * 1
    with torch.no_grad():
        guard([y], T)
    (g,) = torch.autograd.grad((y * NAN).sum(), x)
    assert g.isnan().all()


# Contained


def test_contained_leaves_what_is_finite_alone():
    contained, (a, b) = Contained(T), leaves((T, 2), (T, 3))
    entered = contained.enter([a, None, b])
    assert entered[0] is a
    assert entered[1] is None
    assert entered[2] is b
    assert contained.rows is None
    out = [a.sum(1), torch.ones(T)]
    assert all(x is y for x, y in zip(contained.leave(out), out, strict=True))


@every_bad
def test_contained_computes_with_zeros_and_leaves_nan(bad):
    contained, a, count = Contained(T), with_bad(bad, 1, 2), torch.arange(T)
    b = torch.randn(T, 3).double()
    entered = contained.enter([a, None, b, count])
    assert contained.rows.tolist() == [True, False, True, True]
    assert entered[1] is None
    assert entered[3] is count  # integers are neither good nor bad
    for x, given in ((entered[0], a), (entered[2], b)):
        assert not x[1].any()
        assert torch.equal(x[[0, 2, 3]], given[[0, 2, 3]])
    left = contained.leave([b * 2, count + 1])
    assert left[0][1].isnan().all()
    assert torch.equal(left[0][[0, 2, 3]], 2 * b[[0, 2, 3]])
    assert torch.equal(left[1], count + 1)


@every_bad
@pytest.mark.parametrize("tasks", [1, T])
def test_gradients_of_what_is_shared(bad, tasks):
    """Those of the tasks that are finite, and no others, to second order."""
    (w,) = leaves((3, 3))
    x = torch.randn(tasks, 2, 3).double()
    sick = x.clone()
    sick[0, 1, 1] = bad

    def run(x):
        contained = Contained(len(x))
        (entered,) = contained.enter([x])
        (y,) = contained.leave([(entered @ w).sin()])
        (g,) = torch.autograd.grad((y * y).sum(), w, create_graph=True)
        return y, g, *torch.autograd.grad(g.square().sum(), w)

    y, *ours = run(sick)
    rest, *without = run(x[1:])
    assert y[0].isnan().all()
    assert torch.equal(y[1:], rest)
    for a, e in zip(ours, without, strict=True):
        assert_near(a, e, 1e-13)


def test_a_task_that_becomes_bad_inside_is_left_out():
    (w,) = leaves((2,))
    x = torch.ones(T, 2).double()
    contained = Contained(T)
    (entered,) = contained.enter([x])
    (y,) = contained.leave([entered * w])
    (g,) = torch.autograd.grad((y * with_bad(NAN, 3, 2)).sum(), w)
    assert g.isfinite().all()


def test_contained_without_gradients():
    contained = Contained(T)
    with torch.no_grad():
        (x,) = contained.enter([with_bad(NAN, 0, 2)])
        (y,) = contained.leave([x + 1])
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()
