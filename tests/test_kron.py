"""kron_update and kron_transform against dense Kronecker products in float64, to any order."""

import pytest
import torch

from fastkfo.functional import kron_transform, kron_update
from tests.cases import (
    CASES,
    IMPLEMENTATIONS,
    SMALL,
    operands,
    skip_unless_available,
)
from tests.dense import (
    assert_near,
    dense_transform,
    dense_update,
    derivatives,
)

TOLERANCE = 1e-10
THIRD_ORDER = (
    "operands_lrbs",
    "gaps_tasks",
    "ragged",
    "psd_wide",
    "tasks_shared_param",
    "scale_one",
    "lr_elementwise",
    "empty_among_others",
)
CHECKED = (
    "operands_lrbs",
    "operands_ls",
    "operands_rb",
    "size_1",
    "psd_wide",
    "tasks_right",
    "tasks_no_axis_in_grad",
    "scale_row",
    "scale_one",
    "lr_scalar",
    "empty_tasks",
)

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def named(*names):
    found = [case for case in SMALL if case.name in names]
    assert len(found) == len(names)
    return pytest.mark.parametrize("case", found, ids=str)


def compare(actual, expected):
    assert len(actual) == len(expected)
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert_near(x, y, TOLERANCE, f"[{i}]")


@every_implementation
@every_case
def test_update_value(case, implementation, device):
    skip_unless_available(implementation, device)
    x = operands(case, device=device)
    compare(x.update(kron_update, implementation=implementation), x.dense().update(dense_update))


@every_implementation
@every_case
def test_transform_value(case, implementation, device):
    skip_unless_available(implementation, device)
    x = operands(case, device=device)
    compare(
        x.transform(kron_transform, implementation=implementation),
        x.dense().transform(dense_transform),
    )


def derivatives_agree(case, implementation, device, order, op="update"):
    skip_unless_available(implementation, device)
    x = operands(case, device=device).leaves()
    y = operands(case, device=device).dense().leaves()
    if op == "update":
        actual = x.update(kron_update, implementation=implementation)
        expected, inputs, wanted = y.update(dense_update), x.tensors(), y.tensors()
    else:
        x.lists["params"] = y.lists["params"] = []
        x.lr = y.lr = 0.0
        actual = x.transform(kron_transform, implementation=implementation)
        expected, inputs, wanted = y.transform(dense_transform), x.tensors(), y.tensors()
    compare(derivatives(actual, inputs, order), derivatives(expected, wanted, order))


@every_implementation
@every_case
def test_gradient(case, implementation, device):
    derivatives_agree(case, implementation, device, order=1)


@every_implementation
@every_case
def test_double_gradient(case, implementation, device):
    derivatives_agree(case, implementation, device, order=2)


@every_implementation
@named("operands_lrbs", "ragged", "tasks_all", "scale_one", "operands_none")
def test_double_gradient_of_transform(case, implementation, device):
    derivatives_agree(case, implementation, device, order=2, op="transform")


@every_implementation
@named(*THIRD_ORDER)
def test_third_order(case, implementation, device):
    derivatives_agree(case, implementation, device, order=3)


@every_implementation
@named("operands_lrbs", "tasks_left")
def test_fourth_order(case, implementation, device):
    derivatives_agree(case, implementation, device, order=4)


@pytest.mark.slow
@every_implementation
@named(*CHECKED)
def test_gradcheck(case, implementation, device):
    skip_unless_available(implementation, device)
    x = operands(case, device=device)

    def update(*tensors):
        given = iter(tensors)
        return tuple(
            x.map(lambda _: next(given)).update(kron_update, implementation=implementation)
        )

    tensors = [t.detach().requires_grad_() for t in x.tensors()]
    assert torch.autograd.gradcheck(update, tensors)
    assert torch.autograd.gradgradcheck(update, tensors)


@every_implementation
@named("operands_lrbs", "ragged", "tasks_all")
def test_each_gradient_alone(case, implementation, device):
    """Whatever subset of the operands wants a gradient, it is the same one."""
    skip_unless_available(implementation, device)
    all_of_them = operands(case, device=device).leaves()
    out = all_of_them.update(kron_update, implementation=implementation)
    expected = torch.autograd.grad(sum(u.square().sum() for u in out), all_of_them.tensors())
    for k, wanted in enumerate(expected):
        x = operands(case, device=device)
        leaf = x.tensors()[k].requires_grad_()
        out = x.update(kron_update, implementation=implementation)
        (actual,) = torch.autograd.grad(sum(u.square().sum() for u in out), leaf)
        assert_near(actual, wanted, 1e-12, f"operand {k}")


@every_implementation
def test_outputs_unused_and_operands_shared_by_items(implementation):
    """One factor for two items, an item without a cotangent, one output used twice."""
    a = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    g = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    u, v, _ = kron_transform(g, [a, a, None], implementation=implementation)
    (u * u).sum().backward(retain_graph=True)
    v.sum().backward()
    assert g[2].grad is None
    assert_near(g[0].grad, 2 * a.mT @ (a @ g[0]), 1e-12)
    assert_near(a.grad, 2 * (a @ g[0]) @ g[0].mT + torch.ones_like(g[1]) @ g[1].mT, 1e-12)


@every_implementation
def test_items_of_unlike_dtypes_share_a_call(implementation):
    dtypes = (torch.float64, torch.float32, torch.float64)
    grads = [torch.randn(3, 2, dtype=d, requires_grad=True) for d in dtypes]
    left = [torch.randn(3, 3, dtype=d) for d in dtypes]
    out = kron_transform(grads, left, implementation=implementation)
    assert [u.dtype for u in out] == list(dtypes)
    received = torch.autograd.grad([u.sum() for u in out], grads)
    for g, a, u, d in zip(grads, left, out, received, strict=True):
        assert_near(u, a @ g, 1e-6)
        assert_near(d, a.mT @ torch.ones_like(g), 1e-6)


@every_implementation
def test_empty_lists(implementation):
    assert kron_update([], [], lr=0.1, implementation=implementation) == []
    assert kron_transform([], implementation=implementation) == []


@every_implementation
@named("operands_lrbs", "expanded", "ragged", "conv_8x3x3x3", "lr_elementwise")
def test_arguments_are_unchanged(case, implementation):
    x = operands(case).leaves()
    before = [(t.detach().clone(), t.stride(), t._version) for t in x.tensors()]
    out = x.update(kron_update, implementation=implementation)
    derivatives(out, x.tensors(), 3)
    for t, (value, stride, version) in zip(x.tensors(), before, strict=True):
        assert torch.equal(t.detach(), value)
        assert (t.stride(), t._version) == (stride, version)


@every_implementation
def test_outputs_are_new_tensors(implementation):
    """Even where there is nothing to do, writing to an output must not reach an argument."""
    for g in (torch.randn(3, 4), torch.randn(3), torch.randn(())):
        (u,) = kron_transform([g], implementation=implementation)
        assert u.data_ptr() != g.data_ptr()
        p = torch.randn_like(g)
        (u,) = kron_update([p], [torch.zeros_like(g)], lr=0.0, implementation=implementation)
        assert u.data_ptr() != p.data_ptr()


@every_implementation
def test_a_task_with_nan_stays_alone(implementation):
    """Other tasks come out bitwise as without it."""
    torch.manual_seed(3)
    g, a, c, b = (torch.randn(3, *shape) for shape in ((5, 7, 9), (7, 7), (9, 9), (7, 9)))
    (clean,) = kron_transform([g], [a], [c], [b], implementation=implementation)
    for spoilt in (g, a, c, b):
        kept = spoilt[1].clone()
        spoilt[1].fill_(float("nan"))
        (out,) = kron_transform([g], [a], [c], [b], implementation=implementation)
        spoilt[1] = kept
        assert out[1].isnan().all()
        assert torch.equal(out[[0, 2]], clean[[0, 2]])


@pytest.mark.skipif("native" not in IMPLEMENTATIONS, reason="compares two implementations")
@every_case
def test_implementations_agree(case):
    """Far closer than to the oracle: both add the same few numbers."""
    x = operands(case)
    compare(
        x.update(kron_update, implementation="native"),
        x.update(kron_update, implementation="reference"),
    )
