"""Triton's convolutions against plain PyTorch in float64."""

import importlib
import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch.nn import grad as nn_grad

from fastkfo.kernels import triton as installed
from tests.triton_ops import MARKS, OURS, close, dense, draw, first, last, name_of, ops

__all__ = ["ops"]  # a fixture

pytestmark = MARKS


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


def test_tf32_follows_the_switch_for_convolutions(ops, device, monkeypatch):
    precision = importlib.import_module(f"{OURS}.launch").precision
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert precision(torch.float32) == "tf32x3"  # the fixture's switch
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert precision(torch.float32) == "tf32"
    assert precision(torch.float64) == precision(torch.bfloat16) == "ieee"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert precision(torch.float32) == "ieee"


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
