"""Compiles every Triton kernel ahead of time as its launcher would, and prints one JSON line each.

Runs in a process of its own, without TRITON_INTERPRET:

    PYTHONPATH=. python tests/triton_compile.py 80,90 float32,tf32,bfloat16

The operands have shapes and no data (device "meta"); instead of a launch there is a compilation for
each compute capability named. What two launches share is compiled once.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from fastkfo.kernels import triton as ops
from fastkfo.kernels.triton import launch

NAMES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int32: "i32",
}  # fmt: skip
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"


def source(kernel, arguments, constants):
    """What Triton's launcher derives from the arguments of a call."""
    signature, constexprs, attributes = {}, dict(constants), {}
    for i, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=False)):
        name, special = parameter.name, not parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature[name] = f"*{NAMES[value.dtype]}"
            attributes[i,] = [["tt.divisibility", 16]]
        elif value is None or (value == 1 and special):
            signature[name], constexprs[name] = "constexpr", value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {p.name: signature[p.name] for p in kernel.params}  # none may be missing
    return ASTSource(kernel, signature, constexprs, attributes)


class Compiler:
    """Takes the place of launch.run."""

    def __init__(self, capabilities):
        self.capabilities = capabilities
        self.dtype = None
        self.done = set()

    def __call__(self, kernel, grid, tile, *arguments, **constants):
        given = source(kernel, arguments, constants)
        key = (given.hash(), tile.warps, tile.stages)
        if key in self.done:
            return
        self.done.add(key)
        for capability in self.capabilities:
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            made = triton.compile(given, GPUTarget("cuda", capability, 32), options)
            row = {
                "kernel": kernel.__name__, "dtype": self.dtype, "capability": capability,
                "tile": tile, "shared": made.metadata.shared, "cubin": len(made.asm["cubin"]),
                **resources(made.asm["cubin"]),
            }  # fmt: skip
            print(json.dumps(row), flush=True)


def resources(cubin):
    """Registers, and bytes of local memory: the stack that spilled registers take."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said).groups()
    return {"registers": int(registers), "local": int(stack) + int(local)}


def meta(dtype, *shape):
    return torch.empty(shape, dtype=dtype, device="meta")


def conv(dtype, n, size, channels, outputs, kernel=(3, 3), stride=(1, 1)):
    """A convolution with everything on it, and its two adjoints."""
    x = meta(dtype, 4, n, size, size, channels)
    weight, bias = meta(dtype, 4, outputs, channels, *kernel), meta(dtype, 4, outputs)
    rest = (stride, (1, 1), (1, 1), 1)
    y = ops.conv2d(x, weight, bias, x, weight, *rest)
    ops.conv2d_input(y, weight, [size, size], *rest)
    ops.conv2d_weight(x, y, kernel, *rest, True)


def bare_conv(dtype):
    """The smallest one, where every size is one: Triton makes constants of those."""
    x, weight = meta(dtype, 1, 1, 1, 1, 1), meta(dtype, 1, 1, 1, 1, 1)
    rest = ((1, 1), (0, 0), (1, 1), 1)
    ops.conv2d(x, weight, None, None, None, *rest)
    ops.conv2d_input(x, weight, [1, 1], *rest)
    ops.conv2d_weight(x, x, (1, 1), *rest, False)


def norm(dtype, pixels, channels, full=True):
    x, w = meta(dtype, 4, pixels, channels), meta(dtype, 4, channels) if full else None
    statistics = meta(launch.accumulator(dtype), 4, channels)
    ops.batch_norm(x, w, w, 1e-5, full)
    rest = (x, x, statistics, statistics, w, w, full)
    ops.batch_norm_backward(*rest)
    ops.batch_norm_double_backward(x if full else None, w, w, *rest)


def pool(dtype):
    x, window = meta(dtype, 4, 25, 42, 42, 64), ([2, 2], [2, 2], [0, 0])
    y, where = ops.max_pool2d(x, *window, [1, 1], [21, 21])
    ops.max_pool2d_scatter(y, where, [42, 42], *window, [1, 1])
    ops.max_pool2d_gather(x, where)
    y = ops.avg_pool2d(x, *window, [21, 21], True, 0)
    ops.avg_pool2d_backward(y, [42, 42], *window, True, 0)


def main(capabilities, dtypes):
    """Representative layers: few channels and many, the most chunks that there are, the least."""
    compiler = launch.run = Compiler(capabilities)
    for name in dtypes:
        torch.backends.cudnn.conv.fp32_precision = "tf32" if name == "tf32" else "ieee"
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        compiler.dtype = name
        conv(dtype, 25, 42, 64, 64)
        conv(dtype, 25, 84, 3, 32, stride=(2, 2))
        norm(dtype, 25 * 84 * 84, 64)
        pool(dtype)
        if name == "float32":
            bare_conv(dtype)
            norm(dtype, 25, 1, full=False)


if __name__ == "__main__":
    main([int(x) for x in sys.argv[1].split(",")], sys.argv[2].split(","))
