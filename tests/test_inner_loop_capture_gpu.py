"""Recorded inner loops on a GPU: the numbers of the calls they stand for."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fastkfo
from fastkfo.inner_loop.recorder import EAGER_CALLS
from tests.batches import NEEDS, batch
from tests.models import assert_close, learner_of

pytestmark = pytest.mark.gpu
CALLS = EAGER_CALLS + 3


def pair(name, transform="kron-psd", **options):
    ours = learner_of(fastkfo, name, transform, **NEEDS.get(name, {})).cuda()
    return [
        fastkfo.InnerLoop(copy.deepcopy(ours), F.cross_entropy, 3, capture=x, **options)
        for x in (False, True)
    ]


def tasks(name, k):
    """Other numbers every time."""
    x_s, y_s, x_q, y_q = [x.cuda() for x in batch(name, 4)]
    return x_s + 0.1 * k if x_s.is_floating_point() else x_s, y_s, x_q, y_q


def step(loop, data):
    loop.zero_grad(set_to_none=True)
    out = loop(*data)
    out.loss.mean().backward()
    return out, [p.grad for p in loop.parameters()]


def compare(a, b, tol=1e-10):
    total = max(x.norm().item() for x in a[1] if x is not None)
    assert_close(b[0].loss.detach(), a[0].loss.detach(), tol=tol)
    assert_close(b[0].predictions, a[0].predictions, tol=tol)
    assert_close(b[0].support_loss, a[0].support_loss, tol=tol)
    for x, y in zip(a[1], b[1], strict=True):
        if x is not None:
            assert_close(y, x, floor=1e-3 * total, tol=tol)


@pytest.mark.parametrize("backend", ["auto", "batched"])
@pytest.mark.parametrize("adapt", [False, True], ids=["fixed", "adapt"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_replays_equal_calls(name, adapt, backend):
    loops = pair(name, backend=backend, adapt_transform=adapt)
    optimizers = [torch.optim.SGD(x.parameters(), 0.01) for x in loops]
    for k in range(CALLS):
        compare(*[step(loop, tasks(name, k)) for loop in loops])
        for x in optimizers:
            x.step()
    (known,) = loops[1].recorder._known.values()
    assert known.recording is not None
    for a, b in zip(loops[0].buffers(), loops[1].buffers(), strict=True):
        assert_close(b.double(), a.double(), tol=1e-10)


def test_gradients_in_any_order():
    found = []
    for loop in pair("cnn"):
        for k in range(EAGER_CALLS + 1):
            step(loop, tasks("cnn", k))
        loop.zero_grad()
        losses = [loop(*tasks("cnn", k)).loss for k in range(3)]
        for k in (1, 0, 2):
            (losses[k] * (k + 1)).sum().backward()
        found.append([p.grad for p in loop.parameters()])
    total = max(x.norm().item() for x in found[0])
    for a, b in zip(*found, strict=True):
        assert_close(b, a, floor=1e-3 * total, tol=1e-10)


def test_replays_wait_for_nothing():
    loop = pair("cnn")[1]
    for k in range(EAGER_CALLS + 1):
        step(loop, tasks("cnn", k))
    data = tasks("cnn", 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step(loop, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_on_a_stream_of_ones_own():
    plain, loop = pair("mlp", backend="batched")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for k in range(CALLS):
        with torch.cuda.stream(stream):
            found = step(loop, tasks("mlp", k))
        stream.synchronize()
        compare(step(plain, tasks("mlp", k)), found)


def test_scaled_and_autocast():
    loops = [x.float() for x in pair("mlp", backend="batched")]
    found = []
    for loop in loops:
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        optimizer = torch.optim.SGD(loop.parameters(), 0.01)
        for k in range(CALLS):
            data = [x.float() if x.is_floating_point() else x for x in tasks("mlp", k)]
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                loss = loop(*data).loss.mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append([p.detach() for p in loop.parameters()])
    (known,) = loops[1].recorder._known.values()
    assert known.recording is not None
    for a, b in zip(*found, strict=True):
        assert_close(b, a, tol=1e-3)


def test_out_of_memory_leaves_it_usable():
    loop = fastkfo.InnerLoop(
        learner_of(fastkfo, "mlp", "kron-psd").cuda(), F.cross_entropy, 3, backend="batched"
    )
    loop.capture = True
    x_s, y_s, x_q, y_q = tasks("mlp", 0)
    many = [x.repeat(20000, *[1] * (x.dim() - 1)) for x in (x_s, y_s, x_q, y_q)]
    for _ in range(EAGER_CALLS):
        out, _ = step(loop, many)
    want = out.loss.detach().clone()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1) / total)
    try:
        with pytest.raises(RuntimeError, match="cannot be recorded: CUDA out of memory"):
            loop(*many)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    loop.capture = "auto"
    for _ in range(CALLS):
        out, _ = step(loop, many)
    assert_close(out.loss.detach(), want, tol=1e-12)


def test_a_step_of_ones_own():
    model = torch.nn.Linear(8, 4).cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    twin = copy.deepcopy(model)
    other = torch.optim.SGD(twin.parameters(), 0.1)

    def run(model, optimizer, x, y):
        optimizer.zero_grad(set_to_none=False)
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    x, y = torch.randn(16, 8, device="cuda"), torch.randn(16, 4, device="cuda")
    replay = fastkfo.capture(lambda *data: run(model, optimizer, *data), (x, y))
    for k in range(CALLS):
        a, b = replay(x + k, y), run(twin, other, x + k, y)
        torch.testing.assert_close(a, b.detach())
    torch.testing.assert_close(model.weight, twin.weight)
