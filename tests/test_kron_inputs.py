"""Whatever is wrong with an argument is said at once: its name, what was expected, what came."""

import math

import pytest
import torch

from fastkfo import ImplementationUnavailable
from fastkfo.functional import gram, kron_transform, kron_update
from tests.cases import (
    HAS_NATIVE,
    IMPLEMENTATIONS,
)

every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def good():
    """One item with every operand, [2, 3, 5]."""
    return {
        "params": [torch.ones(2, 3, 5)],
        "grads": [torch.ones(2, 3, 5)],
        "left": [torch.ones(3, 3)],
        "right": [torch.ones(5, 5)],
        "bias": [torch.ones(3, 5)],
        "scale": [torch.ones(2, 3, 5)],
        "lr": 0.1,
    }


def t(*shape, **options):
    return torch.ones(*shape, **options)


WRONG = {
    # shapes
    "params_shape": (
        {"params": [t(2, 3, 4)]},
        ValueError,
        r"params\[0\].*\[2, 3, 5\].*\[2, 3, 4\]",
    ),
    "params_wider": ({"params": [t(7, 2, 3, 5)]}, ValueError, r"params\[0\].*broadcasts"),
    "grads_shape": ({"grads": [t(2, 4, 5)]}, ValueError, r"left\[0\].*\[3, 3\]"),
    "grads_scalar": ({"grads": [t(())]}, ValueError, r"grads\[0\].*scalar"),
    "left_size": ({"left": [t(4, 4)]}, ValueError, r"left\[0\].*3\], got \[4, 4\]"),
    "left_rectangular": ({"left": [t(4, 3)]}, ValueError, r"left\[0\].*\[4, 3\]"),
    "left_transposed_psd": ({"left": [t(3, 4)], "psd": True}, ValueError, r"left\[0\].*r, 3\]"),
    "left_vector": ({"left": [t(3)]}, ValueError, r"left\[0\].*two axes"),
    "left_four_axes": ({"left": [t(1, 1, 3, 3)]}, ValueError, r"left\[0\].*two axes"),
    "left_tasks": ({"left": [t(4, 3, 3)]}, ValueError, r"grads\[0\].*4 tasks.*\[2, 3, 5\]"),
    "right_size": ({"right": [t(3, 3)]}, ValueError, r"right\[0\].*5\], got \[3, 3\]"),
    "right_psd_size": ({"right": [t(5, 4)], "psd": True}, ValueError, r"right\[0\].*r, 5\]"),
    "tasks_differ": ({"left": [t(2, 3, 3)], "right": [t(3, 5, 5)]}, ValueError, r"right.*2 tasks"),
    "bias_shape": ({"bias": [t(5, 3)]}, ValueError, r"bias\[0\].*3, 5\], got \[5, 3\]"),
    "bias_broadcast": ({"bias": [t(1, 5)]}, ValueError, r"bias\[0\].*3, 5\], got \[1, 5\]"),
    "bias_vector": ({"bias": [t(5)]}, ValueError, r"bias\[0\].*two axes"),
    "scale_shape": ({"scale": [t(3, 4)]}, ValueError, r"scale\[0\].*\[2, 3, 5\].*\[3, 4\]"),
    "scale_wider": ({"scale": [t(2, 2, 3, 5)]}, ValueError, r"scale\[0\].*broadcasts"),
    "lr_shape": ({"lr": t(4), "scale": None}, ValueError, r"lr\[0\].*\[4\]"),
    "lr_shape_with_scale": ({"lr": t(4)}, ValueError, r"lr: .*scale\[0\].*\[4\]"),
    # dtypes
    "params_dtype": (
        {"params": [t(2, 3, 5).double()]},
        TypeError,
        r"params\[0\].*float32.*float64",
    ),
    "left_dtype": ({"left": [t(3, 3).half()]}, TypeError, r"left\[0\].*float32.*float16"),
    "bias_dtype": ({"bias": [t(3, 5).bfloat16()]}, TypeError, r"bias\[0\].*float32.*bfloat16"),
    "lr_dtype": ({"lr": t(5).double()}, TypeError, r"lr \* scale\[0\].*float32.*float64"),
    "grads_int": ({"grads": [t(2, 3, 5).long()]}, TypeError, r"grads\[0\].*int64"),
    "left_int": ({"left": [t(3, 3).int()]}, TypeError, r"left\[0\].*int32"),
    "right_bool": ({"right": [t(5, 5).bool()]}, TypeError, r"right\[0\].*bool"),
    "scale_complex": ({"scale": [t(5) * 1j]}, TypeError, r"scale\[0\].*complex64"),
    "params_int": ({"params": [t(2, 3, 5).int()]}, TypeError, r"params\[0\].*int32"),
    "lr_int_tensor": ({"lr": t(()).long()}, TypeError, r"lr.*int64"),
    # devices
    "left_device": ({"left": [t(3, 3, device="meta")]}, ValueError, r"left\[0\].*cpu.*meta"),
    "params_device": ({"params": [t(2, 3, 5, device="meta")]}, ValueError, r"params\[0\].*meta"),
    "grads_device": ({"grads": [t(2, 3, 5, device="meta")]}, ValueError, r"expected device meta"),
    "lr_device": ({"lr": t((), device="meta"), "scale": None}, ValueError, r"lr\[0\].*cpu.*meta"),
    "lr_device_scale": ({"lr": t((), device="meta")}, ValueError, r"lr: .*cpu.*meta"),
    # lists
    "grads_tensor": ({"grads": t(2, 3, 5)}, TypeError, "grads.*list.*Tensor"),
    "grads_none": ({"grads": None}, TypeError, "grads.*list.*NoneType"),
    "grads_generator": ({"grads": (x for x in [t(3)])}, TypeError, "grads.*list.*generator"),
    "grads_entry_none": ({"grads": [None]}, TypeError, r"grads\[0\].*NoneType"),
    "grads_entry_list": ({"grads": [[1.0]]}, TypeError, r"grads\[0\].*list"),
    "params_none": ({"params": None}, TypeError, "params"),
    "params_entry_none": ({"params": [None]}, TypeError, "params"),
    "params_longer": ({"params": [t(2, 3, 5)] * 2}, ValueError, "params.*1 entries.*2"),
    "params_dict": ({"params": {"a": t(2, 3, 5)}}, TypeError, "params.*list.*dict"),
    "left_tensor": ({"left": t(3, 3)}, TypeError, "left.*list.*Tensor"),
    "left_shorter": ({"left": []}, ValueError, "left.*1 entries.*0"),
    "right_longer": ({"right": [t(5, 5)] * 3}, ValueError, "right.*1 entries.*3"),
    "bias_number": ({"bias": 1.0}, TypeError, "bias.*list.*float"),
    "scale_number_entry": ({"scale": [2.0]}, TypeError, r"scale\[0\].*float"),
    "left_string": ({"left": "a"}, TypeError, r"left\[0\].*str"),
    # numbers and options
    "lr_nan": ({"lr": math.nan}, ValueError, "lr.*finite.*nan"),
    "lr_inf": ({"lr": -math.inf}, ValueError, "lr.*finite.*-inf"),
    "lr_list_inf": ({"lr": [math.inf]}, ValueError, r"lr\[0\].*finite.*inf"),
    "lr_list_longer": ({"lr": [0.1, 0.2]}, ValueError, "lr.*1.*2"),
    "lr_none": ({"lr": None}, TypeError, "lr.*NoneType"),
    "lr_bool": ({"lr": True}, TypeError, "lr.*bool"),
    "lr_string": ({"lr": "0.1"}, TypeError, "lr.*str"),
    "lr_complex": ({"lr": 1j}, TypeError, "lr.*complex"),
    "psd_int": ({"psd": 1}, TypeError, "psd.*int"),
    "psd_none": ({"psd": None}, TypeError, "psd.*NoneType"),
}


@every_implementation
@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument(name, implementation):
    changes, error, message = WRONG[name]
    arguments = good() | changes
    with pytest.raises(error, match=message):
        kron_update(**arguments, implementation=implementation)
    if any(key in arguments and key in changes for key in ("params", "lr")):
        return
    arguments = {k: v for k, v in arguments.items() if k not in ("params", "lr")}
    with pytest.raises(error, match=message):
        kron_transform(**arguments, implementation=implementation)


@every_implementation
def test_the_item_at_fault_is_named(implementation):
    grads = [torch.ones(3, 3) for _ in range(4)]
    left = [None, torch.ones(3, 3), torch.ones(2, 2), None]
    with pytest.raises(ValueError, match=r"left\[2\]"):
        kron_transform(grads, left, implementation=implementation)


@pytest.mark.parametrize("name", ["cuda", "", "Native", None, 3, ["native"]])
def test_unknown_implementation(name):
    with pytest.raises(
        ValueError, match=r"implementation.*'auto', 'native', 'triton', 'reference'"
    ):
        kron_transform([torch.ones(3)], implementation=name)
    if not isinstance(name, list):
        with pytest.raises(ValueError, match="implementation"):
            gram([torch.ones(3, 3)], implementation=name)


def test_unavailable_implementations():
    on_meta = [torch.ones(3, 3, device="meta")]
    for op in (kron_transform, gram):
        with pytest.raises(ImplementationUnavailable, match=r"triton.*cpu"):
            op([torch.ones(3, 3)], implementation="triton")
        with pytest.raises(ImplementationUnavailable, match=r"native.*meta"):
            op(on_meta, implementation="native")
        if not HAS_NATIVE:
            with pytest.raises(ImplementationUnavailable, match="could not be loaded"):
                op([torch.ones(3, 3)], implementation="native")


def test_meta_tensors_take_the_reference():
    g, a = torch.ones(2, 3, 5, device="meta"), torch.ones(4, 3, device="meta")
    (u,) = kron_update([g], [g], [a], lr=0.1, psd=True)
    assert (u.shape, u.device.type) == ((2, 3, 5), "meta")


@every_implementation
@pytest.mark.parametrize(
    ("factors", "error", "message"),
    [
        (torch.ones(2, 3, 3), TypeError, "factors.*list.*Tensor"),
        (None, TypeError, "factors.*list.*NoneType"),
        ((x for x in [torch.ones(3, 3)]), TypeError, "factors.*list.*generator"),
        ([None], TypeError, r"factors\[0\].*NoneType"),
        ([torch.ones(3, 3), torch.ones(3)], ValueError, r"factors\[1\].*r, n\], got \[3\]"),
        ([torch.ones(())], ValueError, r"factors\[0\]"),
        ([torch.ones(3, 3).long()], TypeError, r"factors\[0\].*int64"),
        ([torch.ones(3, 3) * 1j], TypeError, r"factors\[0\].*complex64"),
        ([torch.ones(3, 3).to(torch.float8_e4m3fn)], TypeError, r"factors\[0\].*float8"),
        ([[[1.0]]], TypeError, r"factors\[0\].*list"),
    ],
)
def test_wrong_factors_of_gram(factors, error, message, implementation):
    with pytest.raises(error, match=message):
        gram(factors, implementation=implementation)


@every_implementation
def test_views_that_are_negated_lazily(implementation):
    """`z.conj().imag` shares its memory with -z.imag; nothing may read it unnegated."""
    torch.manual_seed(0)
    z = torch.randn(5, 3, 3, dtype=torch.complex128)
    lazy = list(z.conj().imag)
    assert lazy[0].is_neg()
    plain = [x.resolve_neg() for x in lazy]

    def run(operands):
        g, a, c, b, s = (x.detach().requires_grad_() for x in operands)
        (u,) = kron_transform([g], [a], [c], [b], [s], implementation=implementation)
        first = torch.autograd.grad(u, (g, a, c, b, s), operands[0], create_graph=True)
        second = torch.autograd.grad(first, (g, a, c, b, s), operands, allow_unused=True)
        return [u, *first, *(x for x in second if x is not None)]

    for actual, expected in zip(run(lazy), run(plain), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    (actual,) = gram(lazy[:1], implementation=implementation)
    torch.testing.assert_close(actual, plain[0].mT @ plain[0], rtol=1e-12, atol=1e-12)
