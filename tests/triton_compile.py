"""Compiles every Triton kernel ahead of time as its launcher would, and prints one JSON line each.

Runs in a process of its own, without TRITON_INTERPRET:

    PYTHONPATH=. python tests/triton_compile.py 90 float32,tf32,bfloat16
    PYTHONPATH=. python tests/triton_compile.py gfx942 float32,bfloat16,float64

The first argument is a compute capability of NVIDIA's, or the name of an architecture of AMD's. The
operands have shapes and no data (device "meta"); instead of a launch there is a compilation. What
two launches share is compiled once.
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


def target_of(name):
    """The GPU that a name on the command line means."""
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name), 32)


def pointer(x, target):
    """What is known of a tensor's address; on AMD also whether 32 bits lead to its end."""
    known = [["tt.divisibility", 16]]
    if target.backend == "hip" and x.untyped_storage().nbytes() < 2**31:
        known.append(["tt.pointer_range", 32])
    return known


def source(kernel, arguments, constants, target):
    """What Triton's launcher derives from the arguments of a call."""
    signature, constexprs, attributes = {}, dict(constants), {}
    for i, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=False)):
        name, special = parameter.name, not parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature[name] = f"*{NAMES[value.dtype]}"
            attributes[i,] = pointer(value, target)
        elif parameter.annotation_type:
            signature[name] = parameter.annotation_type
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

    def __init__(self, target):
        self.target = target
        self.dtype = None
        self.done = set()

    def __call__(self, kernel, grid, tile, *arguments, **constants):
        given = source(kernel, arguments, constants, self.target)
        key = (given.hash(), tile.warps, tile.stages)
        if key in self.done:
            return
        self.done.add(key)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        made = triton.compile(given, self.target, options)
        found = amd_usage(made.asm) if self.target.backend == "hip" else nvidia_usage(made.asm)
        row = {
            "kernel": kernel.__name__, "dtype": self.dtype, "target": str(self.target.arch),
            "tile": tile, "shared": made.metadata.shared, "precision": constants.get("PRECISION"),
            "constants": str(constants), **found,
        }  # fmt: skip
        print(json.dumps(row), flush=True)


def nvidia_usage(asm):
    """Registers, and bytes of local memory: the stack that spilled registers take."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said).groups()
    return {
        "registers": int(registers), "local": int(stack) + int(local), "spilled": 0,
        "size": len(asm["cubin"]),
    }  # fmt: skip


def amd_usage(asm):
    """The same from the assembler's text, and how many registers were spilled, wherever to.

    Scalar ones go to lanes of vector registers; what of those goes to memory is counted there.
    """
    read = dict(re.findall(r"\.(\w+): +(\d+)$", asm["amdgcn"], re.MULTILINE))
    return {
        "registers": int(read["vgpr_count"]), "local": int(read["private_segment_fixed_size"]),
        "spilled": int(read["vgpr_spill_count"]),
        "size": len(asm["hsaco"]),
    }  # fmt: skip


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


def kron(dtype, batch, n, m, full, *absent):
    """An item with everything but what is absent; S full, or one number of each task."""
    tasks = 4
    shapes = {"left": (n, n), "right": (m, m), "bias": (n, m)}
    x = meta(dtype, tasks, batch, n, m)
    given = [None if name in absent else meta(dtype, tasks, *shapes[name]) for name in shapes]
    operands = [[one] for one in (x, *given, x if full else meta(dtype, tasks, 1, 1, 1))]
    dims, alpha = [tasks, batch, n, m], [0.1]
    wanted = sum(1 << k for k, (one,) in enumerate(operands) if one is not None)
    ops.kron_forward(*operands, [x], dims, alpha)
    ops.kron_backward([x], *operands, dims, alpha, [wanted])
    ops.kron_double_backward([x], *operands, *operands, dims, alpha, [wanted | 32])


def gram(dtype, rows, n):
    x, square = meta(dtype, 4, rows, n), meta(dtype, 4, n, n)
    ops.gram([x])
    ops.gram_jvp([x], [x])
    ops.gram_vjp([x], [square])


def main(target, dtypes):
    """Representative layers: few channels and many, the most chunks that there are, the least."""
    compiler = launch.run = Compiler(target)
    launch.platform = lambda: target.backend
    for name in dtypes:
        switch = "tf32" if name == "tf32" else "ieee"
        torch.backends.cudnn.conv.fp32_precision = switch
        torch.backends.cuda.matmul.fp32_precision = switch
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        compiler.dtype = name
        conv(dtype, 25, 42, 64, 64)
        conv(dtype, 25, 84, 3, 32, stride=(2, 2))
        norm(dtype, 25 * 84 * 84, 64)
        pool(dtype)
        gram(dtype, 64, 64)
        if name != "tf32":  # one product where float32 takes three: what fits those fits it
            kron(dtype, 2048, 32, 9, True)
        if name in ("float32", "float64"):
            kron(dtype, 2048, 64, 9, False)
        if name == "float32":
            bare_conv(dtype)
            norm(dtype, 25, 1, full=False)
            kron(dtype, 1, 32, 1, False)
            kron(dtype, 2048, 1, 32, True)
            kron(dtype, 2**20, 1, 1, True, "left", "right", "bias")


if __name__ == "__main__":
    main(target_of(sys.argv[1]), sys.argv[2].split(","))
