"""A GPU that is older than the kernels: what is chosen automatically falls back, and says why.

Its capability is a mock. "cpu" is taken for such a GPU where tensors are needed.
"""

import pytest
import torch
import torch.nn.functional as F

import fastkfo
from fastkfo.kernels import native, selector, triton
from tests.batches import batch, learner, no_warnings

WHY = "the kernels are for sm_80 and later, this is sm_75"
LAYERS = {
    "conv2d": lambda f, **o: f.conv2d(torch.ones(1, 1, 1, 3, 3), torch.ones(1, 1, 1, 2, 2), **o),
    "batch_norm": lambda f, **o: f.batch_norm(torch.eye(4)[None], **o),
    "max_pool2d": lambda f, **o: f.max_pool2d(torch.ones(1, 1, 1, 4, 4), 2, **o),
    "avg_pool2d": lambda f, **o: f.avg_pool2d(torch.ones(1, 1, 1, 4, 4), 2, **o),
}


@pytest.fixture(autouse=True)
def gpus(monkeypatch):
    """Two GPUs, of which the first is too old."""
    monkeypatch.delenv("FASTKFO_IMPLEMENTATION", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda of=None: (9, 0) if of == "cuda:1" else (7, 5)
    )
    loaded = native.Status("prebuilt", "_C_cuda.so", None)
    monkeypatch.setattr(native, "cuda_status", lambda: loaded)
    monkeypatch.setattr(triton, "why_unavailable", lambda kind: None)
    selector.reset()
    yield
    monkeypatch.undo()
    selector.reset()


@pytest.fixture
def cpu_is_gpu(gpus, monkeypatch):
    """The CPU counts as the older GPU."""
    monkeypatch.setattr(selector, "_kind", lambda device: "cuda")


@pytest.mark.parametrize("op", ["layers", "inner_loop"])
def test_each_gpu_by_its_own_age(op):
    kernels = "triton" if op == "layers" else "native"
    for device, chosen in (("cuda:0", "reference"), ("cuda:1", kernels), ("cuda", "reference")):
        assert selector.select("auto", torch.device(device), op) == chosen
        assert selector.unavailable(kernels, device, op) == (WHY if chosen != kernels else None)
    assert selector.select(kernels, torch.device("cuda:1"), op) == kernels
    with pytest.raises(selector.ImplementationUnavailable, match=f"'{kernels}' on cuda:0: {WHY}"):
        selector.select(kernels, torch.device("cuda:0"), op)


def test_an_amd_gpu_is_not_too_old(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert selector.too_old() is None


def test_backends_says_why():
    text = repr(fastkfo.backends())
    assert f"triton on cuda: not available: {WHY}" in text
    assert f"auto on cuda, inner_loop: reference ({WHY})" in text
    assert f"auto on cuda, layers: reference ({WHY})" in text


@pytest.mark.parametrize("op", LAYERS)
@pytest.mark.usefixtures("cpu_is_gpu")
def test_layers(op):
    run = LAYERS[op]
    with no_warnings():
        found, want = (run(fastkfo.functional, implementation=x) for x in ("auto", "reference"))
    pairs = zip(found, want, strict=True) if isinstance(found, tuple) else [(found, want)]
    assert all([torch.equal(a, b) for a, b in pairs])
    with pytest.raises(selector.ImplementationUnavailable, match=WHY):
        run(fastkfo.functional, implementation="triton")


@pytest.mark.usefixtures("cpu_is_gpu")
def test_the_fused_op():
    x, y = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    layers, theta = [fastkfo.functional.Layer("linear", 4, 5, weight=0)], [torch.randn(5, 4)]
    run = fastkfo.functional.inner_loop
    found, want = (
        run(layers, theta, x, y, x, y, steps=1, lr=0.1, implementation=name).loss
        for name in ("auto", "reference")
    )
    assert torch.equal(found, want)
    with pytest.raises(selector.ImplementationUnavailable, match=WHY):
        run(layers, theta, x, y, x, y, steps=1, lr=0.1, implementation="native")


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.usefixtures("cpu_is_gpu")
def test_an_inner_loop_is_batched(name, capsys):
    loop = fastkfo.InnerLoop(learner(name, "kron-psd"), F.cross_entropy, 2)
    batched = fastkfo.InnerLoop(learner(name, "kron-psd"), F.cross_entropy, 2, backend="batched")
    data = batch(name, 3)
    with no_warnings():
        assert torch.equal(loop(*data).loss, batched(*data).loss)
    assert loop.why_one_by_one() is None
    fastkfo.explain(loop, *data[:2])
    told = capsys.readouterr().out
    assert f"  layers: PyTorch's own, since {WHY}" in told
    if name == "mlp":
        assert f"fused: no, there is no kernel for cpu: {WHY}" in told
    with pytest.raises(ValueError, match=WHY if name == "mlp" else "fused"):
        fastkfo.InnerLoop(learner(name, "kron-psd"), F.cross_entropy, 2, backend="fused")
