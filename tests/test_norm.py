"""reference/norm.py against `F.batch_norm` task after task, to the second derivative."""

import pytest
import torch
import torch.nn.functional as F

from fastkfo.reference import norm
from tests.cases import lay_out
from tests.dense import assert_near, derivatives

SHAPES = {
    "vectors": (3, 5, 4),
    "vectors_one_channel": (2, 7, 1),
    "vectors_one_task": (1, 6, 3),
    "sequences": (2, 3, 4, 5),
    "images": (2, 3, 4, 5, 2),
    "images_1x1": (3, 4, 2, 1, 1),
    "one_image": (2, 1, 3, 4, 3),
    "volumes": (2, 2, 3, 2, 3, 2),
}
AFFINE = {
    "none": (None, None),
    "tasks": ("tasks", "tasks"),
    "shared": ("shared", "shared"),
    "mixed": ("tasks", "shared"),
    "weight_only": ("tasks", None),
    "bias_only": (None, "shared"),
}
EPS = 1e-3
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_affine = pytest.mark.parametrize("affine", AFFINE.values(), ids=AFFINE)


def build(shape, affine, layout="contiguous"):
    """x, weight, bias, about one in size and away from zero mean."""
    x = lay_out(torch.randn(shape).double() + 0.5, layout).detach().requires_grad_()
    sizes = {"tasks": (shape[0], shape[2]), "shared": (shape[2],)}
    return x, *[
        None if kind is None else (torch.randn(sizes[kind]).double() + 1).requires_grad_()
        for kind in affine
    ]


def of_task(value, t):
    return value[t] if value is not None and value.dim() == 2 else value


def loop(x, weight, bias, mean=None, var=None):
    """The oracle: on batch statistics, or on those that are given."""
    if weight is None and bias is not None:  # PyTorch's second derivative fails without a weight
        weight = torch.ones_like(bias)
    return torch.stack(
        [
            F.batch_norm(
                x[t], of_task(mean, t), of_task(var, t), of_task(weight, t), of_task(bias, t),
                training=mean is None, eps=EPS,
            )
            for t in range(len(x))
        ]
    )  # fmt: skip


def all_orders(output, tensors, order):
    given = [x for x in tensors if x is not None]
    return [output, *derivatives([output], given, order)]


def compare(actual, expected):
    assert len(actual) == len(expected)
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_near(a, e, 1e-10, f"[{k}]")


@every_shape
@every_affine
def test_batch_norm(shape, affine):
    tensors = build(shape, affine)
    compare(
        all_orders(norm.batch_norm(*tensors, EPS)[0], tensors, 2),
        all_orders(loop(*tensors), tensors, 2),
    )


@pytest.mark.parametrize("layout", ["transposed", "gaps", "expanded", "offset"])
@pytest.mark.parametrize("name", ["vectors", "images"])
def test_layouts(name, layout):
    tensors = build(SHAPES[name], AFFINE["tasks"], layout)
    compare(
        all_orders(norm.batch_norm(*tensors, EPS)[0], tensors, 2),
        all_orders(loop(*tensors), tensors, 2),
    )


def test_channels_last():
    x, weight, bias = build(SHAPES["images"], AFFINE["tasks"])
    x = x.detach().movedim(2, -1).contiguous().movedim(-1, 2).requires_grad_()
    y, mean, var = norm.batch_norm(x, weight, bias, EPS)
    compare([y], [loop(x, weight, bias)])
    assert mean.shape == var.shape == (2, 4)


@every_shape
def test_statistics_are_the_mean_and_the_biased_variance(shape):
    x, _, _ = build(shape, AFFINE["none"])
    _, mean, var = norm.batch_norm(x, None, None, EPS)
    rows = x.detach().movedim(2, 1).flatten(2)  # [T, C, N ...]
    compare([mean, var], [rows.mean(2), rows.var(2, correction=0)])


@pytest.mark.parametrize("name", ["vectors", "images"])
@pytest.mark.parametrize("affine", [AFFINE["none"], AFFINE["tasks"]], ids=["none", "tasks"])
def test_gradgradcheck(name, affine):
    tensors = build(SHAPES[name], affine)
    given = [x for x in tensors if x is not None]

    def op(*given):
        rest = iter(given)
        y, *_ = norm.batch_norm(*[x if x is None else next(rest) for x in tensors], EPS)
        return y

    assert torch.autograd.gradcheck(op, given)
    assert torch.autograd.gradgradcheck(op, given)


@every_shape
@every_affine
@pytest.mark.parametrize("kind", ["tasks", "shared", "rank_of_x"])
def test_normalise_with_given_statistics(shape, affine, kind):
    tensors = build(shape, affine)
    sizes = (shape[2],) if kind == "shared" else (shape[0], shape[2])
    mean, var = torch.randn(sizes).double(), torch.rand(sizes).double() + 0.1
    given = mean, var
    if kind == "rank_of_x":
        given = [s.reshape(shape[0], 1, shape[2], *[1] * (len(shape) - 3)) for s in given]
    x, weight, bias = tensors
    compare(
        all_orders(norm.normalise(x, *given, weight, bias, EPS), tensors, 2),
        all_orders(loop(x, weight, bias, mean, var), tensors, 2),
    )


def test_tasks_do_not_see_one_another():
    x, weight, bias = build(SHAPES["images"], AFFINE["tasks"])
    clean, *_ = norm.batch_norm(x, weight, bias, EPS)
    sick = x.detach().clone()
    sick[0, 0, 0] = torch.nan
    y, mean, _ = norm.batch_norm(sick, weight, bias, EPS)
    assert torch.equal(y[1], clean[1])
    assert torch.equal(y[0, :, 1:], clean[0, :, 1:])  # nor do channels
    assert mean[0, 0].isnan()


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_float32_is_as_exact_as_plain_float32(mean):
    x, weight, bias = (v.detach().float() for v in build((3, 20, 4, 5, 5), AFFINE["tasks"]))
    x = x + mean
    exact = loop(x.double(), weight.double(), bias.double())
    ours, plain = norm.batch_norm(x, weight, bias, EPS)[0], loop(x, weight, bias)
    allowed = 2 * (plain - exact).norm()
    floor = 8 * torch.finfo(torch.float32).eps * (20 * 25) ** 0.5 * exact.norm()
    assert (ours - exact).norm() <= max(allowed, floor)
