"""What surrounds the Triton kernels: refusals, availability, the same bits twice, large tensors."""

import importlib
import subprocess
import sys

import pytest
import torch

from fastkfo.kernels import triton as installed
from tests.triton_ops import MARKS, OURS, draw, ops

__all__ = ["ops"]  # a fixture

pytestmark = MARKS

REST = ((1, 1), (1, 1), (1, 1), 1)  # stride, padding, dilation, groups


def test_operands_that_a_kernel_would_misread(ops, device):
    x = draw(device, torch.float32, 2, 2, 5, 6, 3)
    weight, bias = draw(device, torch.float32, 2, 5, 3, 3, 3), draw(device, torch.float32, 2, 5)
    with pytest.raises(ValueError, match="x: expected a contiguous tensor"):
        ops.conv2d(x.transpose(2, 3), weight, bias, None, None, *REST)
    with pytest.raises(TypeError, match=r"weight: expected dtype torch.float32, got torch.float64"):
        ops.conv2d(x, weight.double(), bias, None, None, *REST)
    with pytest.raises(TypeError, match=r"x: expected a dtype among .*, got torch.int64"):
        ops.avg_pool2d(x.long(), [2, 2], [2, 2], [0, 0], [2, 3], True, 0)
    with pytest.raises(TypeError, match=r"where: expected int32, got torch.int64"):
        ops.max_pool2d_gather(x, x.long())
    with pytest.raises(ValueError, match="weight: expected device"):
        ops.batch_norm(x[0, 0], weight.to("meta"), None, 1e-5, False)
    launch = importlib.import_module(f"{OURS}.launch")
    with pytest.raises(ValueError, match="tasks: expected at most 65535"):
        launch.check_sizes(65536, 1, 1, 1)


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


@pytest.mark.gpu
def test_the_same_bits_twice():
    x, dy = (draw("cuda", torch.float32, 4, 25, 21, 21, 32) for _ in range(2))
    once, again = (installed.conv2d_weight(x, dy, (3, 3), *REST, True) for _ in range(2))
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
