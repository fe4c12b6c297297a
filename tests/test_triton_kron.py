"""Triton's Kronecker update and its derivatives against the formula in float64."""

import importlib
import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from fastkfo.kernels import triton as installed
from fastkfo.reference.kron import Operands, kron_transform
from tests.cases import HAS_NATIVE, lay_out
from tests.triton_ops import EVERY, MARKS, OURS, close, dense, draw, guarded, name_of, ops

__all__ = ["ops"]  # a fixture

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled")]

GRAD, LEFT, RIGHT, BIAS, SCALE, COTANGENT = BITS = (1, 2, 4, 8, 16, 32)
X = ("grads", "left", "right", "bias", "scale")
ALPHA = -0.3
_T = "tasks"


@dataclass(frozen=True)
class Case:
    """One item. A factor or a bias is None, "shared" or "tasks"; a scale is a shape or None."""

    name: str
    dims: tuple = (2, 3, 3, 5)
    left: str | None = "shared"
    right: str | None = "shared"
    bias: str | None = "shared"
    scale: tuple | None = (2, 3, 3, 5)
    layout: str = "contiguous"

    def shapes(self):
        t, _, n, m = self.dims
        one = {"left": (n, n), "right": (m, m), "bias": (n, m)}
        kinds = {name: getattr(self, name) for name in one}
        shapes = {
            name: None if kind is None else (t, *one[name]) if kind == _T else one[name]
            for name, kind in kinds.items()
        }
        return {"grads": self.dims, **shapes, "scale": self.scale}

    @property
    def wanted(self):
        return sum(
            bit
            for bit, shape in zip(BITS, self.shapes().values(), strict=False)
            if shape is not None
        )

    def draw(self, device, dtype):
        """The operands by name, None for an absent one."""
        return {
            name: None if shape is None else lay_out(draw(device, dtype, *shape), self.layout)
            for name, shape in self.shapes().items()
        }

    def full(self, device, dtype):
        return lay_out(draw(device, dtype, *self.dims), self.layout)

    def terms(self, bit):
        """Roundings that a result may have: of two products, its sums, and a dozen more."""
        t, b, n, m = self.dims
        one = self.scale is not None and math.prod(self.scale[-3:]) == 1
        sums = {LEFT: b * m, RIGHT: b * n, BIAS: b, SCALE: b * n * m if one else 1}
        return 2 * (n + m) + t * sums.get(bit, 0) + 12


def flat(results):
    return itertools.chain.from_iterable(results)


def lists(x):
    return [[x[name]] for name in X]


def formula(x, v, param, alpha=ALPHA):
    """Y, its gradients in x, and a function for those of ⟨d, gradients⟩ in x and v; by autograd."""
    given = [name for name in X if x[name] is not None]
    leaves = {name: dense(x[name]).requires_grad_() for name in given}
    cotangent = dense(v).requires_grad_()

    def canonical(name):
        one = leaves.get(name)
        shared = name in ("left", "right", "bias") and one is not None and one.dim() == 2
        return one.expand(v.shape[0], *one.shape) if shared else one

    y = alpha * kron_transform(Operands(*(canonical(name) for name in X)))
    gradients = torch.autograd.grad(y, leaves.values(), cotangent, create_graph=True)
    forward = y.detach() if param is None else dense(param) + y.detach()

    def double(d):
        pairs = [
            (g, dense(d[n])) for n, g in zip(given, gradients, strict=True) if d[n] is not None
        ]
        total = sum((g * one).sum() for g, one in pairs) + 0 * cotangent.sum()
        total = total + sum(0 * leaf.sum() for leaf in leaves.values())
        return torch.autograd.grad(total, (*leaves.values(), cotangent), retain_graph=True)

    return forward, [g.detach() for g in gradients], double


def absolute(x):
    return {k: None if v is None else v.abs() for k, v in x.items()}


def run(ops, case, x, v, param, d):
    """The three ops on one item, everything wanted; the arguments' alpha is ALPHA."""
    dims, alpha = list(case.dims), [ALPHA]
    y = ops.kron_forward(*lists(x), [param], dims, alpha)
    first = ops.kron_backward([v], *lists(x), dims, alpha, [case.wanted])
    rest = (*lists(d), dims, alpha, [case.wanted | COTANGENT])
    return y, first, ops.kron_double_backward([v], *lists(x), *rest)


def check(ops, case, device, dtype):
    x, d = case.draw(device, dtype), case.draw(device, dtype)
    v, param = case.full(device, dtype), case.full(device, dtype)
    found = run(ops, case, x, v, param, d)
    y, first, double = formula(x, v, param)
    sizes = formula(absolute(x), v.abs(), param.abs(), abs(ALPHA))
    bits = [bit for bit in BITS if case.wanted & bit]
    expected = ([y], first, double(d))
    size = ([sizes[0]], sizes[1], sizes[2](absolute(d)))
    for k, each in enumerate(([GRAD], bits, [*bits, COTANGENT])):
        for one, right, s, bit in zip(found[k], expected[k], size[k], each, strict=True):
            close(one, right, s, (k + 1) * case.terms(bit))
            assert one.dtype == dtype
            assert one.is_contiguous()
    if HAS_NATIVE and dtype == torch.float64:
        cpu = [None if one is None else one.cpu() for one in (v, param)]
        again = run(
            torch.ops.fastkfo,
            case,
            {k: None if one is None else one.cpu() for k, one in x.items()},
            *cpu,
            {k: None if one is None else one.cpu() for k, one in d.items()},
        )
        for one, other in zip(flat(found), flat(again), strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-10, atol=1e-10)


CASES = [
    Case("all_shared"),
    Case("all_tasks", (3, 2, 5, 4), _T, _T, _T, (3, 2, 5, 4)),
    Case("left_tasks", (3, 2, 4, 5), _T, "shared", "shared", (3, 1, 1, 1)),
    Case("right_tasks", (3, 2, 4, 5), "shared", _T, None, (1,)),
    Case("bias_tasks", (3, 2, 4, 5), None, "shared", _T, (2, 4, 5)),
    Case("left_alone", right=None, bias=None, scale=None),
    Case("right_alone", left=None, bias=None, scale=()),
    Case("bias_alone", left=None, right=None, scale=None),
    Case("scale_alone", left=None, right=None, bias=None),
    Case("one_number_alone", left=None, right=None, bias=None, scale=(1,)),
    Case("nothing", (2, 1, 1, 7), None, None, None, None),
    Case("left_and_bias", (1, 3, 4, 2), right=None, scale=None),
    Case("vector", (2, 1, 7, 1), _T, None, _T, (2, 1, 7, 1)),
    Case("vector_with_right", (2, 1, 7, 1), scale=None),
    Case("row", (1, 3, 1, 6), scale=(1, 3, 1, 6)),
    Case("one", (1, 1, 1, 1), scale=(1, 1, 1, 1)),
    Case("blocks", (1, 2, 17, 18), scale=(1,)),
    Case("chunks", (2, 9, 3, 2), _T, "shared", "shared", (1,)),
    Case("transposed", layout="transposed"),
    Case("gaps", left=_T, layout="gaps"),
    Case("expanded", right=_T, layout="expanded"),
    Case("offset", bias=_T, layout="offset"),
    Case("large_n", (2, 2, 65, 3), scale=(1,)),
    Case("large_m", (2, 1, 2, 70), _T, _T, _T, (2, 1, 2, 70)),
]
by_name = {case.name: case for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float64(ops, device, case):
    check(ops, case, device, torch.float64)


@pytest.mark.parametrize("dtype", EVERY[1:], ids=name_of)
@pytest.mark.parametrize("name", ["all_shared", "vector", "chunks", "large_n"])
def test_other_dtypes(ops, device, name, dtype):
    check(ops, by_name[name], device, dtype)


def test_tiles_of_another_platform(ops, device, monkeypatch):
    """AMD's are larger: more matrices go through the kernels."""
    launch = importlib.import_module(f"{OURS}.launch")
    plan = importlib.import_module(f"{OURS}.kron_plan")
    formulas = importlib.import_module(f"{OURS}.kron_formula")
    monkeypatch.setitem(plan._TILES, (launch.platform(), 32), plan._TILES["hip", 32])
    monkeypatch.setattr(formulas, "_wide", None)  # none goes by the formula
    check(ops, Case("large", (1, 2, 33, 3), scale=(1,)), device, torch.float32)


def test_several_steps(ops, device, monkeypatch):
    launch = importlib.import_module(f"{OURS}.launch")
    for programs in (3, 1):
        monkeypatch.setattr(launch, "_PROGRAMS", programs)
        check(ops, Case("steps", (1, 9, 2, 3), scale=(1,)), device, torch.float64)


@pytest.mark.parametrize("given", [*X, None], ids=lambda given: given or "none")
def test_double_backward_along_one(ops, device, given):
    case = by_name["all_tasks"]
    x, v = case.draw(device, torch.float64), case.full(device, torch.float64)
    d = {name: one if name == given else None for name, one in case.draw(device, v.dtype).items()}
    rest = (list(case.dims), [ALPHA], [case.wanted | COTANGENT])
    found = ops.kron_double_backward([v], *lists(x), *lists(d), *rest)
    for one, expected in zip(found, formula(x, v, None)[2](d), strict=True):
        torch.testing.assert_close(dense(one), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["all_tasks", "right_tasks", "large_n"])
def test_what_is_wanted_changes_no_bit(ops, device, name):
    """Nor does a second call."""
    case = by_name[name]
    x, d = case.draw(device, torch.float32), case.draw(device, torch.float32)
    v, param = case.full(device, torch.float32), case.full(device, torch.float32)
    whole, again = (run(ops, case, x, v, param, d) for _ in range(2))
    for one, other in zip(flat(whole), flat(again), strict=True):
        assert torch.equal(one, other)
    dims = list(case.dims)
    for k, bit in enumerate(bit for bit in (*BITS[:5], COTANGENT) if (case.wanted | 32) & bit):
        if bit != COTANGENT:
            (one,) = ops.kron_backward([v], *lists(x), dims, [ALPHA], [bit])
            assert torch.equal(one, whole[1][k])
        (one,) = ops.kron_double_backward([v], *lists(x), *lists(d), dims, [ALPHA], [bit])
        assert torch.equal(one, whole[2][k])


def test_several_items(ops, device):
    """In the order of the items; an item that wants nothing returns nothing; [] is absent."""
    cases = [by_name["vector"], by_name["nothing"], by_name["left_and_bias"]]
    xs = [case.draw(device, torch.float32) for case in cases]
    vs = [case.full(device, torch.float32) for case in cases]
    groups = [[x[name] for x in xs] for name in X]
    groups[2] = []  # none has a right factor
    dims = [size for case in cases for size in case.dims]
    wanted = [GRAD | BIAS, 0, LEFT]
    together = ops.kron_backward(vs, *groups, dims, [ALPHA] * 3, wanted)
    alone = [
        one
        for case, x, v, bits in zip(cases, xs, vs, wanted, strict=True)
        for one in ops.kron_backward([v], *lists(x), list(case.dims), [ALPHA], [bits])
    ]
    assert len(together) == 3
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)
    assert ops.kron_forward([], [], [], [], [], [], [], []) == []


@pytest.mark.parametrize("dims", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_empty_items(ops, device, dims):
    case = Case("empty", dims, "shared", _T, "shared", (1,))
    x, v = case.draw(device, torch.float32), case.full(device, torch.float32)
    y, first, double = run(ops, case, x, v, v, x)
    assert y[0].shape == dims
    likes = [one for one in x.values() if one is not None]
    assert [one.shape for one in first] == [one.shape for one in likes]
    for one in (*first, *double):
        assert not one.any()


def test_any_shape_of_as_many_elements(ops, device):
    weight = draw(device, torch.float32, 4, 3, 2, 2)  # of a convolution: B, n, kh, kw
    left, right = draw(device, torch.float32, 1, 3, 3), draw(device, torch.float32, 16).mul(2)
    dims = [1, 4, 3, 4]
    (y,) = ops.kron_forward([weight], [left], [right], [], [], [], dims, [1.0])
    expected = left[0] @ weight.flatten(2) @ right.view(4, 4)
    torch.testing.assert_close(y, expected.view(weight.shape))
    x = ([weight], [left], [right], [], [])
    gradients = ops.kron_backward([y], *x, dims, [1.0], [GRAD | LEFT | RIGHT])
    assert [one.shape for one in gradients] == [weight.shape, left.shape, right.shape]


def test_a_lazily_negated_operand(ops, device):
    x = draw(device, torch.float32, 1, 2, 3, 4)
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    (y,) = ops.kron_forward([negated], [], [], [], [], [], [1, 2, 3, 4], [2.0])
    assert torch.equal(y, -2 * x)


def test_autocast_and_autograd_are_none_of_its_business(ops, device):
    case = by_name["large_n"]
    x, v = case.draw(device, torch.float32), case.full(device, torch.float32)
    x["left"].requires_grad_()
    expected = run(ops, case, x, v, v, x)
    with torch.autocast(device.type, torch.bfloat16):
        found = run(ops, case, x, v, v, x)
    for one, other in zip(flat(found), flat(expected), strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


@pytest.mark.gpu
def test_tasks_farther_apart_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB")
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device="cuda")
    x = memory.as_strided((2, 1, 3, 4), (2**31, 12, 4, 1))
    x.copy_(guarded(torch.randn(2, 1, 3, 4)))
    left = torch.eye(3, dtype=x.dtype, device="cuda")
    (y,) = installed.kron_forward([x], [left], [], [], [], [], [2, 1, 3, 4], [1.0])
    assert torch.equal(y, x)
