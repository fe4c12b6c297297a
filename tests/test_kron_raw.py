"""The raw ops `torch.ops.fastkfo.*`: opcheck, and no call that crashes or reads out of bounds.

Nothing above them checks what they are given here, so each has to refuse it itself.
"""

import pytest
import torch

from tests.cases import (
    HAS_NATIVE,
)

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="needs the native library")
GRAD, LEFT, RIGHT, BIAS, SCALE, COTANGENT = 1, 2, 4, 8, 16, 32
HUGE = 6148914691236517206  # times 3 it is 2, modulo 2 to the 64


def t(*shape, **options):
    return torch.ones(*shape, **options)


def gone(*shape):
    """A tensor whose memory was taken away."""
    x = torch.ones(*shape)
    x.untyped_storage().resize_(0)
    return x


def forward(ops=torch.ops.fastkfo, **changes):
    """Two items, [2, 2, 3, 5] and [1, 1, 4, 1], the second without operands."""
    arguments = {
        "grads": [t(2, 2, 3, 5), t(4)],
        "left": [t(2, 3, 3), None],
        "right": [t(5, 5), None],
        "bias": [t(3, 5), None],
        "scale": [t(2, 2, 3, 5), t(1)],
        "params": [t(2, 2, 3, 5), t(4)],
        "dims": [2, 2, 3, 5, 1, 1, 4, 1],
        "alpha": [-0.1, 1.0],
    } | changes
    return ops.kron_forward(*arguments.values())


def backward(ops=torch.ops.fastkfo, **changes):
    arguments = {
        "cotangents": [t(2, 2, 3, 5), t(4)],
        "grads": [t(2, 2, 3, 5), t(4)],
        "left": [t(2, 3, 3), None],
        "right": [t(5, 5), None],
        "bias": [t(3, 5), None],
        "scale": [t(2, 2, 3, 5), t(1)],
        "dims": [2, 2, 3, 5, 1, 1, 4, 1],
        "alpha": [-0.1, 1.0],
        "wanted": [31, 17],
    } | changes
    return ops.kron_backward(*arguments.values())


def double_backward(ops=torch.ops.fastkfo, **changes):
    x = {
        "grads": [t(2, 2, 3, 5), t(4)],
        "left": [t(2, 3, 3), None],
        "right": [t(5, 5), None],
        "bias": [t(3, 5), None],
        "scale": [t(2, 2, 3, 5), t(1)],
    }
    arguments = {
        "cotangents": [t(2, 2, 3, 5), t(4)],
        **x,
        **{f"d_{name}": value for name, value in x.items()},
        "dims": [2, 2, 3, 5, 1, 1, 4, 1],
        "alpha": [-0.1, 1.0],
        "wanted": [63, 49],
    } | changes
    return ops.kron_double_backward(*arguments.values())


OPS = {"forward": forward, "backward": backward, "double_backward": double_backward}

WRONG = {
    "dims_missing": {"dims": []},
    "dims_of_one_item": {"dims": [2, 2, 3, 5]},
    "dims_too_many": {"dims": [2, 2, 3, 5, 1, 1, 4, 1, 1]},
    "dims_larger": {"dims": [2, 2, 3, 6, 1, 1, 4, 1]},
    "dims_batch": {"dims": [2, 200000, 3, 5, 1, 1, 4, 1]},
    "dims_tasks": {"dims": [200000, 2, 3, 5, 1, 1, 4, 1]},
    "dims_swapped": {"dims": [2, 2, 5, 3, 1, 1, 4, 1]},
    "dims_moved": {"dims": [4, 1, 3, 5, 1, 1, 4, 1]},
    "dims_zero": {"dims": [2, 0, 3, 5, 1, 1, 4, 1]},
    "dims_negative_pair": {"dims": [2, 2, 3, 5, 1, 1, -4, -1]},
    "dims_all_negative": {"dims": [-2, -2, -3, -5, 1, 1, 4, 1]},
    "dims_overflow": {"dims": [2, 2, 3, 5, 1, HUGE, 3, 1], "grads": [t(2, 2, 3, 5), t(2)]},
    "dims_overflow_of_factor": {
        "dims": [2, 2, 3, 5, 4, 0, 2**31, 1],
        "grads": [t(2, 2, 3, 5), t(0)],
        "left": [t(2, 3, 3), t(0)],
    },
    "alpha_missing": {"alpha": []},
    "alpha_too_many": {"alpha": [1.0, 1.0, 1.0]},
    "grads_fewer": {"grads": [t(2, 2, 3, 5)]},
    "grads_smaller": {"grads": [t(2, 2, 3, 5), t(3)]},
    "grads_larger": {"grads": [t(2, 2, 3, 5), t(5)]},
    "grads_shared": {"grads": [t(2, 3, 5), t(4)]},
    "grads_dtype": {"grads": [t(2, 2, 3, 5), t(4).double()]},
    "grads_int": {"grads": [t(2, 2, 3, 5).int(), t(4).int()]},
    "grads_without_memory": {"grads": [gone(2, 2, 3, 5), t(4)]},
    "left_size": {"left": [t(2, 3, 4), None]},
    "left_smaller": {"left": [t(2, 2), None]},
    "left_tasks": {"left": [t(3, 3, 3), None]},
    "left_vector": {"left": [t(4), None]},
    "left_axes": {"left": [t(1, 1, 1, 3, 2), None]},
    "left_shorter": {"left": [t(2, 3, 3)]},
    "left_longer": {"left": [t(2, 3, 3), None, None]},
    "left_dtype": {"left": [t(2, 3, 3).half(), None]},
    "left_empty": {"left": [t(0), None]},
    "left_without_memory": {"left": [gone(2, 3, 3), None]},
    "right_size": {"right": [t(4, 5), None]},
    "right_gaps": {"right": [t(5, 3)[:, ::2], None]},
    "bias_size": {"bias": [t(3, 4), None]},
    "bias_one_more": {"bias": [t(3, 5), t(5)]},
    "scale_size": {"scale": [t(2, 2, 3, 4), t(1)]},
    "scale_shorter": {"scale": [t(1)]},
    "scale_two": {"scale": [t(2, 2, 3, 5), t(2)]},
    "scale_empty": {"scale": [t(2, 2, 3, 5), t(0)]},
}
WRONG_FORWARD = {
    "params_size": {"params": [t(2, 2, 3, 5), t(3)]},
    "params_shorter": {"params": [t(2, 2, 3, 5)]},
    "params_dtype": {"params": [t(2, 2, 3, 5), t(4).bfloat16()]},
}
WRONG_DERIVATIVE = {
    "cotangents_none": {"cotangents": []},
    "cotangents_shorter": {"cotangents": [t(2, 2, 3, 5)]},
    "cotangents_one_number": {"cotangents": [t(1), t(4)]},
    "cotangents_shared": {"cotangents": [t(2, 3, 5), t(4)]},
    "cotangents_larger": {"cotangents": [t(2, 2, 3, 5), t(40)]},
    "cotangents_dtype": {"cotangents": [t(2, 2, 3, 5).double(), t(4)]},
    "wanted_missing": {"wanted": []},
    "wanted_shorter": {"wanted": [31]},
    "wanted_longer": {"wanted": [31, 17, 1]},
    "wants_absent_left": {"wanted": [31, LEFT]},
    "wants_absent_right": {"wanted": [31, RIGHT]},
    "wants_absent_bias": {"wanted": [31, BIAS]},
    "wants_left_of_no_list": {"left": [], "wanted": [LEFT, 0]},
    "wants_right_of_no_list": {"right": [], "wanted": [RIGHT, 0]},
    "wants_bias_of_no_list": {"bias": [], "wanted": [BIAS, 0]},
    "wants_scale_of_no_list": {"scale": [], "wanted": [SCALE, 0]},
    "wants_all": {"wanted": [-1, -1]},
    "wants_broadcast_left": {"left": [t(1, 1), None]},
    "wants_broadcast_bias": {"bias": [t(5), None]},
    "wants_broadcast_scale": {"scale": [t(5), t(1)]},
}
WRONG_DOUBLE = {
    "d_grads_size": {"d_grads": [t(2, 2, 3, 4), None]},
    "d_left_size": {"d_left": [t(2, 3, 4), None]},
    "d_left_shorter": {"d_left": [None]},
    "d_right_dtype": {"d_right": [t(5, 5).double(), None]},
    "d_bias_size": {"d_bias": [t(3, 4), None]},
    "d_scale_size": {"d_scale": [t(2, 2, 3), None]},
    "d_scale_full_for_one": {"d_scale": [None, t(4)]},
    "d_left_without_memory": {"d_left": [gone(2, 3, 3), None]},
}


@pytest.mark.parametrize("op", OPS)
def test_the_base_call_is_right(op):
    assert all(x.isfinite().all() for x in OPS[op]())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(name, op):
    with pytest.raises(RuntimeError, match="fastkfo"):
        OPS[op](**WRONG[name])


@pytest.mark.parametrize("name", WRONG_FORWARD)
def test_wrong_forward(name):
    with pytest.raises(RuntimeError, match="fastkfo"):
        forward(**WRONG_FORWARD[name])


@pytest.mark.parametrize("op", ["backward", "double_backward"])
@pytest.mark.parametrize("name", WRONG_DERIVATIVE)
def test_wrong_derivative(name, op):
    with pytest.raises(RuntimeError, match="fastkfo"):
        OPS[op](**WRONG_DERIVATIVE[name])


@pytest.mark.parametrize("name", WRONG_DOUBLE)
def test_wrong_double_backward(name):
    with pytest.raises(RuntimeError, match="fastkfo"):
        double_backward(**WRONG_DOUBLE[name])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("lists", ["left", "right", "bias", "scale"])
def test_an_empty_list_means_absent(op, lists):
    wanted = {} if op == "forward" else {"wanted": [GRAD, GRAD]}
    tangents = {f"d_{lists}": []} if op == "double_backward" else {}
    out = OPS[op](**{lists: []}, **tangents, **wanted)
    assert [x.numel() for x in out] == [60, 4]


@pytest.mark.parametrize("shape", [[1] * 40 + [4], [1] * 9 + [2, 2], [2, 1, 2], [2, 2]])
def test_any_number_of_axes(shape):
    x, dims = torch.arange(4.0).reshape(shape), [1, 1, 2, 2]
    (y,) = torch.ops.fastkfo.kron_forward([x], [x], [], [], [], [], dims, [1.0])
    matrix = x.reshape(2, 2)
    assert y.shape == x.shape
    assert torch.equal(y.reshape(2, 2), matrix @ matrix)
    _, left = torch.ops.fastkfo.kron_backward([y], [x], [x], [], [], [], dims, [1.0], [GRAD | LEFT])
    assert left.shape == x.shape
    assert torch.equal(left.reshape(2, 2), y.reshape(2, 2) @ matrix.mT)


WRONG_GRAM = {
    "vector": ("gram", ([t(3)],)),
    "scalar": ("gram", ([t(())],)),
    "int": ("gram", ([t(3, 3).int()],)),
    "dtypes": ("gram", ([t(3, 3), t(3, 3).double()],)),
    "no_memory": ("gram", ([gone(3, 3)],)),
    "no_partner": ("gram_vjp", ([t(3, 3)], [])),
    "more_partners": ("gram_jvp", ([t(3, 3)], [t(3, 3)] * 2)),
    "vjp_size": ("gram_vjp", ([t(4, 3)], [t(4, 4)])),
    "vjp_tasks": ("gram_vjp", ([t(2, 4, 3)], [t(3, 3)])),
    "vjp_dtype": ("gram_vjp", ([t(4, 3)], [t(3, 3).double()])),
    "vjp_no_memory": ("gram_vjp", ([t(4, 3)], [gone(3, 3)])),
    "jvp_size": ("gram_jvp", ([t(4, 3)], [t(3, 3)])),
    "jvp_one_number": ("gram_jvp", ([t(4, 3)], [t(1)])),
}


@pytest.mark.parametrize(("op", "lists"), WRONG_GRAM.values(), ids=WRONG_GRAM)
def test_wrong_gram(op, lists):
    with pytest.raises(RuntimeError, match="fastkfo"):
        getattr(torch.ops.fastkfo, op)(*lists)


OPCHECKED = [
    ([t(2, 2, 3, 5)], [t(2, 3, 3)], [t(5, 5)], [t(3, 5)], [t(2, 2, 3, 5)], [2, 2, 3, 5], [0.5]),
    ([t(4, 3)], [], [None], [], [t(1)], [1, 1, 4, 3], [1.0]),
    ([t(0, 3), t(5)], [t(0, 0), None], [None, t(1, 1)], [], [], [1, 1, 0, 3, 1, 1, 5, 1], [1, 2.0]),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("arguments", OPCHECKED, ids=["all", "few", "empty"])
def test_opcheck_kron(arguments, dtype):
    *lists, dims, alpha = arguments
    lists = [[x if x is None else x.to(dtype) for x in one] for one in lists]
    count = len(alpha)
    wanted = [
        sum(1 << k for k, one in enumerate(lists) if one and one[i] is not None)
        for i in range(count)
    ]
    d = [one or [None] * count for one in lists]
    torch.library.opcheck(torch.ops.fastkfo.kron_forward, (*lists, lists[0], dims, alpha))
    torch.library.opcheck(torch.ops.fastkfo.kron_backward, (lists[0], *lists, dims, alpha, wanted))
    torch.library.opcheck(
        torch.ops.fastkfo.kron_double_backward,
        (lists[0], *lists, *d, dims, alpha, [bits | COTANGENT for bits in wanted]),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_opcheck_gram(dtype):
    factors = [t(4, 3, dtype=dtype), t(2, 2, 5, dtype=dtype), t(0, 2, dtype=dtype).mT]
    squares = [x.mT @ x for x in factors]
    torch.library.opcheck(torch.ops.fastkfo.gram, (factors,))
    torch.library.opcheck(torch.ops.fastkfo.gram_vjp, (factors, squares))
    torch.library.opcheck(torch.ops.fastkfo.gram_jvp, (factors, factors))
