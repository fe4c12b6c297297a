"""The Triton kernels against plain PyTorch in float64: under the interpreter, and on a GPU.

The interpreter has to be chosen before Triton is imported, which other tests' imports may have done
already. So the tests on the CPU run with modules of their own in sys.modules, and leave the others.
Operands lie between NaN, and outputs are NaN until they are written.
"""

import importlib
import itertools
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch.nn import grad as nn_grad

import fastkfo.kernels
from fastkfo.kernels import triton as installed

pytestmark = [
    pytest.mark.slow,  # not once more on the reference: what is compared is no other kernel
    pytest.mark.skipif(not installed.available(), reason="needs triton"),
]

OURS = "fastkfo.kernels.triton"
EVERY = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
name_of = {dtype: str(dtype).removeprefix("torch.") for dtype in EVERY}.get

_interpreted = {}  # the modules, from one test to the next


def swap(modules):
    """Put `modules` in the place of Triton's and ours, and return those."""
    names = [x for x in sys.modules if f"{x}.".startswith(("triton.", f"{OURS}."))]
    # The extension module is for both: it cannot be loaded twice.
    before = {x: sys.modules.pop(x) for x in names if not x.startswith("triton._C")}
    sys.modules.update(modules)
    if OURS in modules:
        fastkfo.kernels.triton = modules[OURS]
    return before


@pytest.fixture
def ops(device, monkeypatch):
    """The ops for a device: interpreted on the CPU."""
    torch.use_deterministic_algorithms(True)  # what is not written is NaN
    precision = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    if device.type == "cuda":
        yield installed
    else:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        before = swap(_interpreted)
        yield importlib.import_module(OURS)
        _interpreted.update(swap(before))
    torch.backends.cudnn.conv.fp32_precision = precision
    torch.use_deterministic_algorithms(False)


def guarded(x):
    """x between NaN: what is read beyond it shows, even where a mask multiplies it by zero."""
    edge = x.new_full((64,), float("nan"))
    return torch.cat([edge, x.flatten(), edge])[64 : 64 + x.numel()].view(x.shape)


def draw(device, dtype, *shape):
    """Values of about one that are exact in every dtype."""
    return guarded(torch.randn(shape).bfloat16().to(device, dtype))


def dense(x):
    """In float64 on the CPU, where the reference is computed."""
    return x.detach().cpu().double()


def first(x):
    """Channels first, as PyTorch takes images."""
    return x.movedim(-1, 2).contiguous()


def last(x):
    return x.movedim(2, -1)


def close(found, expected, size, terms):
    """Within what `terms` roundings of terms that add up to `size` can do, and one of the result.

    Sums are in float32 at least; a result of ten roundings in a row counts as ten terms.
    """
    unit = torch.finfo(torch.float64 if found.dtype == torch.float64 else torch.float32).eps
    bound = terms * unit * size + torch.finfo(found.dtype).eps * expected.abs()
    if found.dtype == torch.float16:
        bound = bound + 2.0**-24  # subnormal numbers
    error = (found.detach().cpu().double() - expected).abs()
    assert found.shape == expected.shape
    assert bool((error <= bound).all()), (error / bound.clamp_min(1e-300)).max()


# Convolutions


@dataclass(frozen=True)
class Conv:
    name: str
    tasks: int = 2
    n: int = 2
    size: tuple = (5, 6)
    channels: int = 3
    outputs: int = 5
    kernel: tuple = (3, 3)
    stride: tuple = (1, 1)
    padding: tuple = (1, 1)
    dilation: tuple = (1, 1)
    groups: int = 1

    @property
    def rest(self):
        return self.stride, self.padding, self.dilation, self.groups

    def weight_shape(self):
        return self.outputs, self.channels // self.groups, *self.kernel

    def out_size(self):
        every = zip(self.size, self.kernel, *self.rest[:3], strict=True)
        return [(h + 2 * p - d * (k - 1) - 1) // s + 1 for h, k, s, p, d in every]

    def operands(self, device, dtype):
        x = draw(device, dtype, self.tasks, self.n, *self.size, self.channels)
        weight = draw(device, dtype, self.tasks, *self.weight_shape())
        return x, weight, draw(device, dtype, self.tasks, self.outputs)

    def cotangent(self, device, dtype):
        return draw(device, dtype, self.tasks, self.n, *self.out_size(), self.outputs)

    def forward(self, x, weight, bias=None):
        biases = itertools.repeat(None) if bias is None else bias
        y = [F.conv2d(*each, *self.rest) for each in zip(first(x), weight, biases, strict=False)]
        return last(torch.stack(y))

    def input(self, dy, weight):
        shape = (self.n, self.channels, *self.size)
        each = zip(first(dy), weight, strict=True)
        return last(torch.stack([nn_grad.conv2d_input(shape, w, g, *self.rest) for g, w in each]))

    def weight(self, x, dy):
        shape, each = self.weight_shape(), zip(first(x), first(dy), strict=True)
        return torch.stack([nn_grad.conv2d_weight(v, shape, g, *self.rest) for v, g in each])


CONVS = [
    Conv("plain"),
    Conv("one_channel", channels=1, outputs=1, size=(4, 4)),
    Conv("blocks", channels=20, outputs=70, kernel=(2, 1), padding=(0, 0), tasks=1, size=(5, 7)),
    Conv("many_channels", tasks=1, n=1, size=(2, 3), channels=67, outputs=2, kernel=(2, 1)),
    Conv("many_pixels", tasks=1, n=3, size=(7, 6), channels=17, outputs=4, kernel=(1, 2)),
    Conv("stride", stride=(2, 2), channels=18, outputs=18),
    Conv("uneven_stride", stride=(3, 2), kernel=(2, 3), padding=(0, 1), outputs=17),
    Conv("dilation", dilation=(2, 1), padding=(2, 1)),
    Conv("dilation_and_stride", stride=(2, 2), dilation=(2, 2), padding=(2, 3), size=(7, 6)),
    Conv("groups", channels=6, outputs=4, groups=2, stride=(2, 1), kernel=(3, 2)),
    Conv("depthwise", tasks=1, channels=3, outputs=6, groups=3),
    Conv("pointwise", kernel=(1, 1), padding=(0, 0), stride=(2, 2), channels=20, outputs=3),
    Conv("one_pixel", tasks=3, n=1, size=(1, 1)),
    Conv("stride_beyond_the_image", size=(1, 2), stride=(3, 3), kernel=(1, 1), padding=(0, 0)),
    Conv("window_beyond_the_image", size=(2, 1), kernel=(4, 5), padding=(1, 2)),
]
# float32 has other tiles.
conv_grid = pytest.mark.parametrize(
    ("case", "dtype"),
    [(x, torch.float64) for x in CONVS] + [(x, torch.float32) for x in CONVS[:8]],
    ids=lambda x: x.name if isinstance(x, Conv) else name_of(x),
)


@conv_grid
def test_conv2d(ops, device, case, dtype):
    x, weight, bias = case.operands(device, dtype)
    y = ops.conv2d(x, weight, bias, None, None, *case.rest)
    sizes = [dense(v).abs() for v in (x, weight, bias)]
    expected = case.forward(dense(x), dense(weight), dense(bias))
    assert y.is_contiguous()
    assert y.dtype == dtype
    close(y, expected, case.forward(*sizes), weight[0, 0].numel() + 2)


@pytest.mark.parametrize("case", CONVS[:6], ids=lambda case: case.name)
def test_conv2d_of_two_terms(ops, device, case):
    (x, weight, _), (x2, weight2, _) = (case.operands(device, torch.float64) for _ in range(2))
    y = ops.conv2d(x, weight, None, x2, weight2, *case.rest)
    both = [(dense(x), dense(weight)), (dense(x2), dense(weight2))]
    expected = sum(case.forward(*pair) for pair in both)
    size = sum(case.forward(v.abs(), w.abs()) for v, w in both)
    close(y, expected, size, 2 * weight[0, 0].numel() + 2)


@conv_grid
def test_conv2d_input(ops, device, case, dtype):
    _, weight, _ = case.operands(device, dtype)
    dy = case.cotangent(device, dtype)
    dx = ops.conv2d_input(dy, weight, list(case.size), *case.rest)
    size = case.input(dense(dy).abs(), dense(weight).abs())
    close(dx, case.input(dense(dy), dense(weight)), size, weight[0].numel() + 2)


@conv_grid
def test_conv2d_weight(ops, device, case, dtype):
    x, _, _ = case.operands(device, dtype)
    dy = case.cotangent(device, dtype)
    dw, db = ops.conv2d_weight(x, dy, case.kernel, *case.rest, True)
    pixels = dy[0, ..., 0].numel() + 2
    close(
        dw, case.weight(dense(x), dense(dy)), case.weight(dense(x).abs(), dense(dy).abs()), pixels
    )
    close(db, dense(dy).sum((1, 2, 3)), dense(dy).abs().sum((1, 2, 3)), pixels)
    assert dw.is_contiguous()
    without, none = ops.conv2d_weight(x, dy, case.kernel, *case.rest, False)
    assert torch.equal(without, dw)
    assert none.shape == (0,)


def test_conv2d_weight_in_several_steps(ops, device, monkeypatch):
    launch = importlib.import_module(f"{OURS}.launch")
    for splits in (2, 1):
        monkeypatch.setattr(launch, "_SPLITS", splits)
        test_conv2d_weight(ops, device, CONVS[0], torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("case", [CONVS[0], CONVS[2]], ids=lambda case: case.name)
def test_convolutions_in_16_bits(ops, device, case, dtype):
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter's tl.dot is wrong for bfloat16")
    test_conv2d(ops, device, case, dtype)
    test_conv2d_input(ops, device, case, dtype)
    test_conv2d_weight(ops, device, case, dtype)


@pytest.mark.parametrize(
    "sizes",
    [{"tasks": 0}, {"n": 0}, {"channels": 0}, {"outputs": 0}, {"size": (0, 3), "padding": (2, 1)}],
    ids=str,
)
def test_empty_convolutions(ops, device, sizes):
    case = Conv("empty", **sizes)
    x, weight, bias = case.operands(device, torch.float32)
    dy = case.cotangent(device, torch.float32)
    y = ops.conv2d(x, weight, bias, None, None, *case.rest)
    assert torch.equal(y, bias[:, None, None, None].expand(y.shape))
    assert torch.equal(ops.conv2d(x, weight, None, None, None, *case.rest), torch.zeros_like(y))
    dx = ops.conv2d_input(dy, weight, case.size, *case.rest)
    assert torch.equal(dx, torch.zeros_like(x))
    dw, db = ops.conv2d_weight(x, dy, case.kernel, *case.rest, True)
    assert torch.equal(dw, torch.zeros_like(weight))
    torch.testing.assert_close(db, dy.sum((1, 2, 3)))


# Batch norm


@dataclass(frozen=True)
class Norm:
    name: str
    shape: tuple = (2, 30, 5)
    affine: bool = True
    relu: bool = True


NORMS = [
    Norm("plain"),
    Norm("linear", relu=False),
    Norm("no_weight", affine=False),
    Norm("no_weight_linear", affine=False, relu=False),
    Norm("one_channel", (2, 37, 1)),
    Norm("one_pixel", (3, 1, 4)),
    Norm("chunks", (1, 700, 3)),
    Norm("blocks", (1, 20, 67), relu=False),
]
norms = pytest.mark.parametrize("case", NORMS, ids=lambda case: case.name)
norm_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of
)


def normalise(x, weight, bias, relu, eps=1e-3):
    """The formula, in plain PyTorch: y, mean and rstd."""
    mean = x.mean(1, keepdim=True)
    rstd = ((x - mean).square().mean(1, keepdim=True) + eps).rsqrt()
    y = (x - mean) * rstd
    if weight is not None:
        y = y * weight[:, None] + bias[:, None]
    return y.relu() if relu else y, mean[:, 0], rstd[:, 0]


def norm_operands(device, dtype, case, count=0):
    """x, weight, bias, then tensors of x's shape."""
    full = [draw(device, dtype, *case.shape) for _ in range(1 + count)]
    full[0] = guarded(full[0] + 3)
    channels = case.shape[::2]
    pair = [draw(device, dtype, *channels) if case.affine else None for _ in range(2)]
    return [full[0], *pair, *full[1:]]


def near(found, expected, case):
    """Within roundings: those of a sum over P, and some dozens of what is no larger than a peak."""
    size = (1 + expected.abs().max()).expand(expected.shape)
    close(found, expected, size, 40 + case.shape[1])


@norms
@norm_dtypes
def test_batch_norm(ops, device, case, dtype):
    x, weight, bias = norm_operands(device, dtype, case)
    y, mean, var = ops.batch_norm(x, weight, bias, 1e-3, case.relu)
    found = (y, mean, (var + 1e-3).rsqrt())
    inputs = [None if v is None else dense(v) for v in (x, weight, bias)]
    for one, expected in zip(found, normalise(*inputs, case.relu), strict=True):
        near(one, expected, case)
    assert found[0].dtype == dtype
    assert found[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def leaves(*tensors):
    return [None if v is None else dense(v).requires_grad_() for v in tensors]


def to_statistics(device, dtype, *values):
    dtype = torch.promote_types(dtype, torch.float32)
    return [v.detach().to(device, dtype) for v in values]


def first_derivative(x, weight, bias, dy, relu):
    """dx, dγ, dβ of the formula, differentiable; without weight and bias at one and zero."""
    if weight is None:
        weight = torch.ones(x.shape[0], x.shape[2], dtype=x.dtype, requires_grad=True)
        bias = torch.zeros_like(weight).requires_grad_()
    y, mean, rstd = normalise(x, weight, bias, relu)
    gradients = torch.autograd.grad(y, (x, weight, bias), dy, create_graph=True)
    return gradients, weight, mean, rstd


@norms
@norm_dtypes
def test_batch_norm_backward(ops, device, case, dtype):
    x, weight, bias, dy = norm_operands(device, dtype, case, 1)
    expected, _, mean, rstd = first_derivative(*leaves(x, weight, bias, dy), case.relu)
    statistics = [
        v.detach().to(device, torch.promote_types(dtype, torch.float32)) for v in (mean, rstd)
    ]
    found = ops.batch_norm_backward(dy, x, *statistics, weight, bias, case.relu)
    for one, value in zip(found, expected, strict=True):
        near(one, value.detach(), case)


@norms
@norm_dtypes
def test_batch_norm_double_backward(ops, device, case, dtype):
    check_double_backward(ops, device, case, dtype, "abc")


@pytest.mark.parametrize("cotangents", ["a", "bc", "c"])
def test_batch_norm_double_backward_of_some(ops, device, cotangents):
    for case in NORMS[:2]:
        check_double_backward(ops, device, case, torch.float64, cotangents)


def check_double_backward(ops, device, case, dtype, cotangents):
    x, weight, bias, dy, a = norm_operands(device, dtype, case, 2)
    b, c = (draw(device, dtype, *case.shape[::2]) for _ in range(2))
    x64, w64, b64, dy64 = leaves(x, weight, bias, dy)
    gradients, gamma, mean, rstd = first_derivative(x64, w64, b64, dy64, case.relu)
    given = [v if name in cotangents else None for v, name in zip((a, b, c), "abc", strict=True)]
    s = sum((dense(v) * g).sum() for v, g in zip(given, gradients, strict=True) if v is not None)
    expected = torch.autograd.grad(s, (dy64, x64, gamma), allow_unused=True, materialize_grads=True)
    statistics = [
        v.detach().to(device, torch.promote_types(dtype, torch.float32)) for v in (mean, rstd)
    ]
    found = ops.batch_norm_double_backward(*given, dy, x, *statistics, weight, bias, case.relu)
    for one, value in zip(found, expected, strict=True):
        near(one, value, case)


def test_batch_norm_far_from_zero(ops, device):
    """E[x²] − E[x]² would have no digit left."""
    x = (torch.randn(1, 700, 3) + 3000).to(device)
    y, mean, found = ops.batch_norm(x, None, None, 1e-5, False)
    var, expected = torch.var_mean(dense(x), 1, correction=0)
    torch.testing.assert_close(dense(mean), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(dense(found), var, rtol=2e-5, atol=0)
    # x − mean is exact; the mean has an error of some 3000 * 2^-24.
    torch.testing.assert_close(
        dense(y), normalise(dense(x), None, None, False, 1e-5)[0], rtol=1e-5, atol=2e-3
    )


def test_batch_norm_in_several_steps(ops, device, monkeypatch):
    launch = importlib.import_module(f"{OURS}.launch")
    monkeypatch.setattr(launch, "_SPLITS", 3)
    monkeypatch.setattr(launch, "_ELEMENTS", dict.fromkeys(launch._ELEMENTS, 64))
    case = Norm("several_steps", (2, 97, 5))
    test_batch_norm(ops, device, case, torch.float64)
    test_batch_norm_backward(ops, device, case, torch.float64)
    test_batch_norm_double_backward(ops, device, case, torch.float64)


def test_batch_norm_with_float32_parameters(ops, device):
    x, dy = (draw(device, torch.bfloat16, 2, 9, 3) for _ in range(2))
    weight, bias = (draw(device, torch.float32, 2, 3) for _ in range(2))
    y, mean, var = ops.batch_norm(x, weight, bias, 1e-3, True)
    rstd = (var + 1e-3).rsqrt()
    near(y, normalise(dense(x), dense(weight), dense(bias), True)[0], Norm("", (2, 9, 3)))
    dx, dweight, dbias = ops.batch_norm_backward(dy, x, mean, rstd, weight, bias, True)
    assert [v.dtype for v in (y, dx, dweight, dbias)] == [torch.bfloat16] * 2 + [torch.float32] * 2


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)], ids=str)
def test_empty_batch_norm(ops, device, shape):
    x, weight, bias, dy, a = norm_operands(device, torch.float32, Norm("empty", shape), 2)
    y, mean, var = ops.batch_norm(x, weight, bias, 1e-3, True)
    rstd = (var + 1e-3).rsqrt()
    assert y.shape == shape
    found = ops.batch_norm_backward(dy, x, mean, rstd, weight, bias, True)
    found += ops.batch_norm_double_backward(a, weight, bias, dy, x, mean, rstd, weight, bias, True)
    for one in found:
        assert not one.any()


# Pooling


@dataclass(frozen=True)
class Pool:
    name: str
    size: tuple = (5, 6)
    channels: int = 3
    kernel: tuple = (2, 2)
    stride: tuple = (2, 2)
    padding: tuple = (0, 0)
    dilation: tuple = (1, 1)
    ceil: bool = False

    def images(self, device, dtype, tasks=2, n=2):
        return draw(device, dtype, tasks, n, *self.size, self.channels)


POOLS = [
    Pool("plain"),
    Pool("overlapping", kernel=(3, 2), stride=(1, 1), padding=(1, 1)),
    Pool("ceil", kernel=(2, 3), stride=(2, 2), padding=(1, 1), ceil=True, size=(6, 5)),
    Pool(
        "ceil_beyond_the_padding",
        kernel=(3, 3),
        stride=(3, 2),
        padding=(0, 1),
        ceil=True,
        size=(4, 6),
    ),
    Pool("whole_image", size=(3, 4), kernel=(3, 4), stride=(3, 4), channels=1),
    Pool("gaps", size=(3, 5), kernel=(1, 2), stride=(2, 3), channels=70),
    Pool("one_pixel", size=(1, 1), kernel=(1, 1), stride=(1, 1)),
    Pool("many_pixels", size=(20, 19), channels=2),
]
DILATED = [Pool("dilation", kernel=(2, 3), dilation=(2, 2), padding=(1, 1), size=(6, 7))]
# The dtype changes no index: every case in float64, one in the others.
pool_dtypes = pytest.mark.parametrize("dtype", EVERY, ids=name_of)


def flat(x):
    """Images as PyTorch takes them, those of all tasks on one axis."""
    return first(dense(x)).flatten(0, 1)


def unflat(y, x):
    """PyTorch's images as ours, of the tasks that x has."""
    return last(y.view(*x.shape[:2], *y.shape[1:]))


def check_max_pool(ops, case, x):
    options = (case.kernel, case.stride, case.padding, case.dilation)
    images = flat(x).requires_grad_()
    expected, index = F.max_pool2d(images, *options, ceil_mode=case.ceil, return_indices=True)
    y, where = ops.max_pool2d(x, *options, list(expected.shape[2:]))
    assert torch.equal(where.cpu(), unflat(index, x).int())
    torch.testing.assert_close(
        y.cpu().double(), unflat(expected, x), rtol=0, atol=0, equal_nan=True
    )
    dy = draw(x.device, x.dtype, *y.shape)
    dx = ops.max_pool2d_scatter(dy, where, list(case.size), *options)
    (gradient,) = torch.autograd.grad(expected, images, flat(dy))
    count = case.kernel[0] * case.kernel[1]
    close(dx, unflat(gradient, x), unflat(gradient, x).new_full((), 4.0 * count), count)
    v = draw(x.device, x.dtype, *x.shape)
    chosen = flat(v).flatten(2).gather(2, index.flatten(2))
    assert torch.equal(
        ops.max_pool2d_gather(v, where).cpu().double(), unflat(chosen.view(expected.shape), x)
    )


@pytest.mark.parametrize("case", POOLS + DILATED, ids=lambda case: case.name)
def test_max_pool2d(ops, device, case):
    check_max_pool(ops, case, case.images(device, torch.float64))


@pool_dtypes
def test_max_pool2d_of_every_dtype(ops, device, dtype):
    check_max_pool(ops, POOLS[1], POOLS[1].images(device, dtype))


@pytest.mark.parametrize("case", [POOLS[1], DILATED[0]], ids=lambda case: case.name)
def test_max_pool2d_of_equal_and_special_values(ops, device, case):
    x = case.images(device, torch.float32).mul_(0.7).round_()
    check_max_pool(ops, case, x)
    x[0, 0, 1:3] = float("nan")
    x[0, 1] = float("-inf")
    x[1, 1, 2, 2] = float("inf")
    check_max_pool(ops, case, x)


@pytest.mark.parametrize("case", POOLS, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("include_pad", "divisor"), [(True, 0), (False, 0), (True, 3)], ids=["pad", "no_pad", "divisor"]
)
def test_avg_pool2d(ops, device, case, include_pad, divisor):
    check_avg_pool(ops, device, case, include_pad, divisor, torch.float64)


@pool_dtypes
def test_avg_pool2d_of_every_dtype(ops, device, dtype):
    check_avg_pool(ops, device, POOLS[1], False, 0, dtype)


def check_avg_pool(ops, device, case, include_pad, divisor, dtype):
    x = case.images(device, dtype)
    images, window = flat(x).requires_grad_(), (case.kernel, case.stride, case.padding)
    rest = (include_pad, divisor or None)
    expected = F.avg_pool2d(images, *window, case.ceil, *rest)
    y = ops.avg_pool2d(x, *window, list(expected.shape[2:]), include_pad, divisor)
    terms = case.kernel[0] * case.kernel[1] + 3
    size = F.avg_pool2d(images.detach().abs(), *window, case.ceil, *rest)
    close(y, unflat(expected.detach(), x), unflat(size, x), terms)
    dy = draw(device, dtype, *y.shape)
    dx = ops.avg_pool2d_backward(dy, list(case.size), *window, include_pad, divisor)
    (gradient,) = torch.autograd.grad(expected, images, flat(dy), retain_graph=True)
    (size,) = torch.autograd.grad(expected, images, flat(dy).abs())
    close(dx, unflat(gradient, x), unflat(size, x), terms)


@pytest.mark.parametrize("shape", [(0, 2, 4, 4, 3), (2, 0, 4, 4, 3), (2, 2, 4, 4, 0)], ids=str)
def test_empty_pools(ops, device, shape):
    x, window = torch.ones(shape, device=device), ([2, 2], [2, 2], [0, 0])
    y, where = ops.max_pool2d(x, *window, [1, 1], [2, 2])
    assert y.shape == where.shape == (*shape[:2], 2, 2, shape[4])
    assert ops.max_pool2d_scatter(y, where, [4, 4], *window, [1, 1]).shape == shape
    assert ops.max_pool2d_gather(x, where).shape == y.shape
    assert ops.avg_pool2d(x, *window, [2, 2], True, 0).shape == y.shape
    assert ops.avg_pool2d_backward(y, [4, 4], *window, True, 0).shape == shape


# What surrounds the kernels


def test_operands_that_a_kernel_would_misread(ops, device):
    case = CONVS[0]
    x, weight, bias = case.operands(device, torch.float32)
    with pytest.raises(ValueError, match="x: expected a contiguous tensor"):
        ops.conv2d(x.transpose(2, 3), weight, bias, None, None, *case.rest)
    with pytest.raises(TypeError, match=r"weight: expected dtype torch.float32, got torch.float64"):
        ops.conv2d(x, weight.double(), bias, None, None, *case.rest)
    with pytest.raises(TypeError, match=r"x: expected a dtype among .*, got torch.int64"):
        ops.avg_pool2d(x.long(), [2, 2], [2, 2], [0, 0], [2, 3], True, 0)
    with pytest.raises(TypeError, match=r"where: expected int32, got torch.int64"):
        ops.max_pool2d_gather(x, x.long())
    with pytest.raises(ValueError, match="weight: expected device"):
        ops.batch_norm(x[0, 0], weight.to("meta"), None, 1e-5, False)
    launch = importlib.import_module(f"{OURS}.launch")
    with pytest.raises(ValueError, match="tasks: expected at most 65535"):
        launch.check_sizes(65536, 1, 1, 1)


def test_tf32_follows_the_switch_for_convolutions(ops, device, monkeypatch):
    precision = importlib.import_module(f"{OURS}.launch").precision
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert precision(torch.float32) == "tf32x3"  # the fixture's switch
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert precision(torch.float32) == "tf32"
    assert precision(torch.float64) == precision(torch.bfloat16) == "ieee"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert precision(torch.float32) == "ieee"


def test_importing_fastkfo_imports_no_triton():
    code = "import sys, fastkfo, fastkfo.kernels.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_availability(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert installed.why_unavailable("cuda") is None
    assert "not on cpu" in installed.why_unavailable("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert installed.why_unavailable("cpu") is None
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not there
    assert not installed.available()
    assert "not installed" in installed.why_unavailable("cuda")
    with pytest.raises(AttributeError, match="no attribute 'conv3d'"):
        _ = installed.conv3d


# On a GPU only


@pytest.mark.gpu
def test_tf32_on_a_gpu():
    case = Conv("tf32", channels=40, outputs=70)
    x, weight, bias = case.operands("cuda", torch.float32)
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        y = installed.conv2d(x, weight, bias, None, None, *case.rest)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    # The operands are exact in ten bits, so only the sums round.
    size = case.forward(*(dense(v).abs() for v in (x, weight, bias)))
    expected = case.forward(dense(x), dense(weight), dense(bias))
    close(y, expected, size, 2 * weight[0, 0].numel() + 2)


@pytest.mark.gpu
def test_the_same_bits_twice():
    case = Conv("bits", tasks=4, n=25, size=(21, 21), channels=32, outputs=32)
    x, dy = case.operands("cuda", torch.float32)[0], case.cotangent("cuda", torch.float32)
    once, again = (installed.conv2d_weight(x, dy, case.kernel, *case.rest, True) for _ in range(2))
    rows = (4, -1, 32)
    once += installed.batch_norm(x.view(rows), None, None, 1e-5, True)
    again += installed.batch_norm(x.view(rows), None, None, 1e-5, True)
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB")
    n, rest = 2**31 // (64 * 64 * 16) + 4, ((1, 1), (0, 0), (1, 1), 1)
    x = torch.randn(1, n, 64, 64, 16, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(1, 16, 16, 1, 1, dtype=torch.bfloat16, device="cuda")
    end = x[:, -4:].contiguous()
    for op in (
        lambda v: installed.conv2d(v, weight, None, None, None, *rest),
        lambda v: installed.conv2d_input(v, weight, [64, 64], *rest),
        lambda v: installed.max_pool2d(v, [1, 1], [1, 1], [0, 0], [1, 1], [64, 64])[0],
    ):
        assert torch.equal(op(x)[:, -4:], op(end))
    y, mean, var = installed.batch_norm(x.view(1, -1, 16), None, None, 1e-5, False)
    expected = ((end.view(1, -1, 16).float() - mean) * (var + 1e-5).rsqrt()).bfloat16()
    torch.testing.assert_close(y[:, -expected.shape[1] :], expected)
