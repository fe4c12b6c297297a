"""InnerLoop on a GPU: the numbers of the CPU, and no synchronisation."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fastkfo
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


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_nothing_synchronises(name):
    ours = learner_of(fastkfo, name, "kron-psd").cuda()
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, 3)
    data = [x.cuda() for x in batch(name, 5)]
    loop(*data).loss.sum().backward()  # libraries are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop(*data).loss.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_label_out_of_range_marks_its_task():
    ours = learner_of(fastkfo, "mlp", "kron-psd").cuda()
    data = [x.cuda() for x in batch("mlp", 3)]
    data[1][1, 0] = 99
    out = fastkfo.InnerLoop(ours, F.cross_entropy, 2)(*data)
    assert out.finite.tolist() == [True, False, True]
