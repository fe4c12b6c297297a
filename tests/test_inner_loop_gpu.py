"""InnerLoop on a GPU: the numbers of the CPU, and no synchronisation."""

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F

import fastkfo
from tests import fake_gpu
from tests.batches import NEEDS, batch
from tests.models import assert_close, learner_of
from tests.test_inner_loop import PATHS

pytestmark = pytest.mark.gpu


def both(name, transform, path, **options):
    """Meta-gradients on the CPU and on the GPU."""
    on_cpu = learner_of(fastkfo, name, transform, **NEEDS.get(name, {}), **options)
    found = []
    for device in ("cpu", "cuda"):
        ours = copy.deepcopy(on_cpu).to(device)
        data = [x.to(device) for x in batch(name, 5)]
        out = fastkfo.InnerLoop(ours, F.cross_entropy, 3, **path)(*data)
        out.loss.sum().backward()
        found.append((out.loss.detach().cpu(), [p.grad.cpu() for p in ours.parameters()]))
    return found


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("adapt", [False, True], ids=["fixed", "adapt"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "lstm"])
@pytest.mark.filterwarnings("ignore:fastkfo. tasks run one after the other")
def test_equals_the_cpu(name, adapt, path):
    (loss, grads), (loss_gpu, grads_gpu) = both(name, "kron-psd", path, adapt_transform=adapt)
    assert_close(loss_gpu, loss, tol=1e-9)
    total = sum(g.square().sum() for g in grads).sqrt().item()
    for a, b in zip(grads_gpu, grads, strict=True):
        assert_close(a, b, floor=1e-4 * total, tol=1e-9)


@contextmanager
def cuda_watches():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", [x for x in fake_gpu.CASES if x not in fake_gpu.WAITS])
def test_nothing_synchronises(name, monkeypatch):
    case = fake_gpu.CASES[name]
    with fake_gpu.GPU:
        for watched in (nullcontext, cuda_watches):  # libraries are loaded, kernels compiled
            monkeypatch.setattr(fake_gpu, "watched", watched)
            torch.manual_seed(0)
            try:
                case()
            except ValueError as error:
                if not any([x in str(error) for x in ("shared memory", "no kernel for cuda")]):
                    raise
                pytest.skip(str(error).splitlines()[0])


@pytest.mark.parametrize("name", fake_gpu.WAITS)
def test_who_synchronises_is_seen(name, monkeypatch):
    monkeypatch.setattr(fake_gpu, "watched", cuda_watches)
    with fake_gpu.GPU, pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        fake_gpu.CASES[name]()


def test_a_label_out_of_range_marks_its_task():
    ours = learner_of(fastkfo, "mlp", "kron-psd").cuda()
    data = [x.cuda() for x in batch("mlp", 3)]
    data[1][1, 0] = 99
    out = fastkfo.InnerLoop(ours, F.cross_entropy, 2)(*data)
    assert out.finite.tolist() == [True, False, True]
