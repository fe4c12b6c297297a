"""Inner loops on a GPU that is not there: does the host wait for it? One JSON line per case.

Runs in a process of its own, and takes the library made of no_device_guard.cpp:

    PYTHONPATH=. python tests/fake_gpu.py library.so

Tensors have a device, "cuda:0", and no data, so that whoever looks at a number fails; kernels are
not launched. Copies between host and device fail, too, unless they wait for nobody.

tests/test_inner_loop_gpu.py runs the same cases on a GPU.
"""

import contextlib
import ctypes
import json
import sys
import traceback
import warnings

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)  # PyTorch asks once whether there is a GPU

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastkfo
from fastkfo.functional.inner_loop_spec import Spec
from fastkfo.kernels import native, selector

GPU = torch.device("cuda:0")


class Waits(Exception):
    """The host would wait for the device."""


class NobodyWaits(TorchDispatchMode):
    """Refuses copies between devices that block; whatever needs a number fails by itself."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        blocking = not kwargs.get("non_blocking", False)
        if name == "_to_copy":
            target = kwargs.get("device")
            apart = target is not None and target.type != args[0].device.type
        elif name == "copy_":
            apart = args[0].device.type != args[1].device.type and args[1].dim() > 0
            blocking = blocking and not (len(args) > 2 and args[2])
        elif name in ("index", "index_put", "index_put_"):
            indices = [x for x in args[1] if x is not None]
            apart = any([x.device.type != args[0].device.type for x in indices])
        else:
            apart = False
        if apart and blocking:
            raise Waits(f"{func}")
        return func(*args, **kwargs)


watched = NobodyWaits  # what surrounds a call; on a GPU, CUDA watches


def prepare():
    """Stand-ins for what asks the driver."""
    assert native.available()
    from fastkfo.kernels.triton import launch

    launch.run = lambda *arguments, **constants: None
    native._cuda_status = native.Status("prebuilt", "", None)
    torch.cuda.get_rng_state = lambda device: torch.empty(16, dtype=torch.uint8, device="cpu")
    torch.cuda.set_rng_state = lambda state, device: None
    torch.cuda.is_current_stream_capturing = lambda: False
    Spec.tape_size = lambda self, data: 1000
    torch.random.fork_rng = lambda *_, **__: contextlib.nullcontext()
    nn.Module.to = lambda self, *_, **__: self  # all is made where it belongs
    selector.reset()


def mlp(*norm):
    return nn.Sequential(nn.Linear(8, 6), *norm, nn.ReLU(), nn.Linear(6, 5))


def cnn(**norm):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, **norm), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, stride=2), nn.BatchNorm2d(4, **norm), nn.ReLU(), nn.AvgPool2d(1),
        nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 5),
    )  # fmt: skip


def kfo(model, **options):
    update = fastkfo.optim.KroneckerTransform(fastkfo.nn.KroneckerLinear)
    return fastkfo.algorithms.GBML(model, update, lr=0.1, **options)


def tasks(images=False, squares=False):
    shape = (3, 10, 1, 8, 8) if images else (3, 10, 8)
    x_s, x_q = torch.randn(shape), torch.randn(shape)
    y = torch.randn(3, 10, 5) if squares else torch.randint(5, (3, 10))
    return x_s, y, x_q, y


def run(learner, loss=F.cross_entropy, images=False, call=None, grad=True, listed=False, **options):
    """One call of an inner loop, and its meta-gradient."""
    loop = fastkfo.InnerLoop(learner, loss, 2, capture=False, **options)
    data = tasks(images, loss is F.mse_loss)
    if listed:
        x_s, y_s, x_q, y_q = data
        data = [[*x, x[0, :5]] for x in (x_s, y_s, x_q, y_q)]
    with torch.set_grad_enabled(grad), watched():
        out = loop(*data, **(call or {}))
        if grad:
            out.loss.mean().backward()
    assert out.loss.device == GPU
    return loop


def by_hand(learner, images=False):
    clone, loss = learner.clone(tasks=3), fastkfo.per_task(F.cross_entropy)
    x_s, y_s, x_q, y_q = tasks(images)
    with watched():
        for _ in range(2):
            clone.adapt(loss(clone(x_s), y_s))
        loss(clone(x_q), y_q).sum().backward()


def adapted():
    loop = run(kfo(mlp()), backend="fused")
    x, y, *_ = tasks()
    loss = fastkfo.per_task(F.cross_entropy)
    with watched():
        loss(loop.adapt(x, y)(x), y).sum().backward()


def sgd(model):
    return fastkfo.algorithms.MetaSGD(model, lr=0.1)


def own(predictions, targets):
    return F.cross_entropy(predictions, targets, label_smoothing=0.1)


ALGORITHMS = {
    "maml": lambda model: fastkfo.algorithms.MAML(model, lr=0.1),
    "sgd": sgd,
    "kfo": kfo,
    "adapt": lambda model: kfo(model, adapt_transform=True),
    "first order": lambda model: kfo(model, first_order=True),
}
BATCHED = {"backend": "batched"}
CNN = {"backend": "batched", "images": True}
CASES = {
    **{f"fused {k}": lambda f=f: run(f(mlp()), backend="fused") for k, f in ALGORITHMS.items()},
    **{f"batched {k}": lambda f=f: run(f(mlp()), **BATCHED) for k, f in ALGORITHMS.items()},
    **{f"cnn {k}": lambda f=f: run(f(cnn()), **CNN) for k, f in ALGORITHMS.items()},
    **{
        f"cnn {memory} {buffers}": lambda m=memory, b=buffers: run(
            kfo(cnn()), memory=m, buffers=b, **CNN
        )
        for memory in ("full", "checkpoint", "adjoint")
        for buffers in ("shared", "frozen", "per_task")
    },
    "fused norms": lambda: run(kfo(mlp(nn.BatchNorm1d(6), nn.LayerNorm(6))), backend="fused"),
    "fused squares": lambda: run(kfo(mlp()), F.mse_loss, backend="fused"),
    "fused no_grad": lambda: run(kfo(mlp()), backend="fused", grad=False),
    "fused features": lambda: run(
        kfo(nn.Linear(4, 5)), images=True, features=cnn()[:-1], backend="fused"
    ),
    "batched features": lambda: run(kfo(nn.Linear(4, 5)), features=cnn()[:-1], **CNN),
    "adapt of a fused loop": adapted,
    "squares": lambda: run(kfo(mlp()), F.mse_loss, **BATCHED),
    "a loss of one's own": lambda: run(kfo(mlp()), own, **BATCHED),
    "eval": lambda: run(kfo(cnn().eval()), **CNN),
    "no_grad": lambda: run(kfo(cnn()), grad=False, **CNN),
    "chunks": lambda: run(kfo(cnn()), chunk_size=2, **CNN),
    "chunks, adapt": lambda: run(
        kfo(cnn(), adapt_transform=True), chunk_size=2, memory="checkpoint", **CNN
    ),
    "adapt, adjoint": lambda: run(kfo(cnn(), adapt_transform=True), memory="adjoint", **CNN),
    "weights": lambda: run(kfo(cnn()), call={"step_weights": torch.ones(2)}, **CNN),
    "weights, learned": lambda: run(
        kfo(cnn()), call={"step_weights": torch.ones(2, requires_grad=True)}, **CNN
    ),
    "weights, numbers": lambda: run(kfo(cnn()), call={"step_weights": [0.5, 1.0]}, **CNN),
    "weights, numbers and tensors": lambda: run(
        kfo(cnn()), call={"step_weights": [0.5, torch.ones((), requires_grad=True)]}, **CNN
    ),
    "weights on the CPU": lambda: run(
        kfo(cnn()), call={"step_weights": torch.ones(2, device="cpu")}, **CNN
    ),
    "loop": lambda: run(kfo(cnn()), images=True, backend="loop"),
    "loop, per_task": lambda: run(kfo(cnn()), images=True, backend="loop", buffers="per_task"),
    "lists": lambda: run(kfo(mlp()), listed=True, **BATCHED),
    "lists of images": lambda: run(kfo(cnn()), listed=True, **CNN),
    "lists, one by one": lambda: run(kfo(mlp()), listed=True, backend="loop"),
    "a batched learner": lambda: by_hand(kfo(cnn()), images=True),
    "a batched learner, adapt": lambda: by_hand(kfo(mlp(), adapt_transform=True)),
    # and these must be seen to wait; the last one is PyTorch's own `forward` of batch norm
    "a look": lambda: run(kfo(mlp()), lambda p, y: own(p, y) * float(p.sum() > 0), backend="loop"),
    "a copy": lambda: run(kfo(mlp()), lambda p, y: own(p, y.cpu().to(GPU)), backend="loop"),
    "a cumulative average": lambda: run(kfo(cnn(momentum=None)), images=True, backend="loop"),
}  # fmt: skip


WAITS = ("a look", "a copy", "a cumulative average")


def main():
    prepare()
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # no read
    mode = FakeTensorMode()  # one: what is kept from call to call belongs to it
    for name, case in CASES.items():
        error = None
        with mode, GPU:
            try:
                case()
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
                traceback.print_exc()
        print(json.dumps({"case": name, "error": error}), flush=True)


if __name__ == "__main__":
    main()
