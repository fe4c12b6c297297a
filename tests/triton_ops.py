"""The Triton ops under the interpreter or on a GPU, and their operands; no tests here.

The interpreter has to be chosen before Triton is imported, which other tests' imports may have done
already. So the tests on the CPU run with modules of their own in sys.modules, and leave the others.
Operands lie between NaN, and outputs are NaN until they are written.
"""

import importlib
import sys

import pytest
import torch

import fastkfo.kernels
from fastkfo.kernels import triton as installed

MARKS = [
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
    # What is not written is NaN. cuBLAS, where large items go, warns that it wants a variable set.
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
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
