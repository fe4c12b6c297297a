"""Where Triton's kernels read and write in tensors of more than 2^31 elements; one JSON line each.

Runs in a process of its own, in Triton's interpreter:

    PYTHONPATH=. TRITON_INTERPRET=1 python tests/triton_addresses.py

The operands have shapes and no data (device "meta"). The programs at the corners of a launch's grid
run with addresses that nothing is behind: loads give zeros, stores do nothing, and both note where.
Long loops over tiles run for their first and last ones.
"""

import inspect
import itertools
import json

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from fastkfo.kernels import triton as ops
from fastkfo.kernels.triton import conv_kernels, launch, norm_kernels

FAR = 1 << 44  # bytes from one operand to the next: no wrong offset leads from one into another


class Nowhere:
    """A tensor without memory, as the interpreter takes it."""

    def __init__(self, like, base):
        self.dtype, self.size, self.base = like.dtype, like.element_size(), base
        self.count = like.numel()

    def data_ptr(self):
        return self.base


class Addresses:
    """Takes the place of launch.run."""

    def __init__(self):
        self.operands, self.rows = {}, []
        builder = interpreter.InterpreterBuilder
        load = builder.create_masked_load

        def masked_load(this, pointers, mask, *rest):
            self.note("read", pointers, mask)
            nothing = interpreter.TensorHandle(np.zeros_like(mask.data), mask.dtype)
            return load(this, pointers, nothing, *rest)

        builder.create_masked_load = masked_load
        builder.create_masked_store = lambda _, to, value, mask, *rest: self.note("write", to, mask)

    def note(self, what, pointers, mask):
        """Remember the first and the last place, and whether they are an operand's."""
        at = pointers.data.astype(np.uint64)[mask.data.astype(bool)]
        for address in (at.min(), at.max()) if at.size else ():
            place, offset = divmod(int(address) + FAR // 2, FAR)
            name, operand = self.operands.get(place, ("nothing", None))
            offset -= FAR // 2
            inside = operand is not None and 0 <= offset < operand.count * operand.size
            index = offset // (operand.size if operand is not None else 1)
            row = self.seen.setdefault(name, nothing_yet())
            row[what].append(index)
            if not inside or offset % operand.size:
                row["outside"].append(index)

    def __call__(self, kernel, grid, tile, *arguments, **constants):
        given = inspect.getcallargs(kernel.fn, *arguments, **constants)
        self.operands, self.seen = {}, {}
        for place, (name, value) in enumerate(given.items(), 1):
            if isinstance(value, Tensor):
                given[name] = Nowhere(value, place * FAR)
                self.operands[place] = (name, given[name])
        function = kernel.rewrite()
        scope = interpreter._patch_lang(function)
        try:
            types = kernel.fn.__annotations__
            for name, value in given.items():
                if "constexpr" not in str(types.get(name)):
                    given[name] = interpreter._implicit_cvt(value)
            interpreter.interpreter_builder.set_grid_dim(*grid)
            for program in itertools.product(*[sorted({0, n // 2, n - 1}) for n in grid]):
                interpreter.interpreter_builder.set_grid_idx(*program)
                function(**given)
        finally:
            scope.restore()
        for name, operand in self.operands.values():
            row = self.seen.get(name, nothing_yet())
            seen = {k: [min(x), max(x)] if x else None for k, x in row.items()}
            about = {"case": self.case, "kernel": kernel.fn.__name__, "operand": name}
            print(json.dumps({**about, "elements": operand.count, **seen}), flush=True)


def nothing_yet():
    return {"read": [], "write": [], "outside": []}


def ends(count):
    """`range`, of which only the first and the last ones are run."""
    return sorted({k for k in (0, 1, count - 2, count - 1) if 0 <= k < count})


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def conv(tasks, n, size, channels, outputs, kernel=(1, 1), stride=(1, 1), padding=(0, 0), groups=1):
    """A convolution with everything on it, and its two adjoints."""
    x = meta(tasks, n, *size, channels)
    weight, bias = meta(tasks, outputs, channels // groups, *kernel), meta(tasks, outputs)
    rest = (stride, padding, (1, 1), groups)
    y = ops.conv2d(x, weight, bias, x, weight, *rest)
    ops.conv2d_input(y, weight, size, *rest)
    ops.conv2d_weight(x, y, kernel, *rest, True)


def norm(tasks, pixels, channels):
    x, w = meta(tasks, pixels, channels), meta(tasks, channels)
    statistics = meta(tasks, channels, dtype=torch.float32)
    ops.batch_norm(x, w, w, 1e-5, True)
    rest = (x, x, statistics, statistics, w, w, True)
    ops.batch_norm_backward(*rest)
    ops.batch_norm_double_backward(x, w, w, *rest)


def pool(tasks, n, size, channels):
    x, window = meta(tasks, n, *size, channels), ([2, 2], [2, 2], [0, 0])
    half = [k // 2 for k in size]
    y, where = ops.max_pool2d(x, *window, [1, 1], half)
    ops.max_pool2d_scatter(y, where, size, *window, [1, 1])
    ops.max_pool2d_gather(x, where)
    ops.avg_pool2d(x, *window, half, True, 0)
    ops.avg_pool2d_backward(y, size, *window, True, 0)


MOST = 2**31 - 2**16  # what launch.py lets through
CASES = {
    # more than 2^31 elements by images, by tasks, in weights, in groups; an image, pixels as many
    # as are allowed
    "conv images": lambda: conv(1, 32776, (64, 64), 16, 16),
    "conv tasks": lambda: conv(65535, 3, (42, 42), 64, 64, (3, 3), (2, 2), (1, 1)),
    "conv weights": lambda: conv(2000, 1, (8, 8), 128, 1024, (3, 3), padding=(1, 1)),
    "conv groups": lambda: conv(64, 4, (128, 128), 1024, 1024, (3, 3), padding=(1, 1), groups=512),
    "conv image": lambda: conv(2, 2, (11584, 11584), 16, 16),
    "conv pixels": lambda: conv(1, 131068, (128, 128), 1, 1),
    "conv one group": lambda: conv(1, 2, (3, 3), 46336, 46336),
    "norm rows": lambda: norm(1, MOST, 3),
    "norm tasks": lambda: norm(65535, 32 * 33, 64),
    "norm channels": lambda: norm(2, 33, 64 * 65535),
    "pool images": lambda: pool(1, 32776, (64, 64), 17),
    "pool tasks": lambda: pool(65535, 3, (28, 28), 64),
    "pool image": lambda: pool(2, 2, (11584, 11584), 16),
    "pool pixels": lambda: pool(1, 131068, (128, 128), 2),
}


def main():
    for module in (conv_kernels, norm_kernels):
        module.range = ends
    launch.run = Addresses()
    for name, case in CASES.items():
        launch.run.case = name
        case()


if __name__ == "__main__":
    main()
