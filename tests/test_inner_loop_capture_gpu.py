"""Recorded inner loops on a GPU: the numbers of the calls they stand for."""

import copy
import warnings
from contextlib import contextmanager

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


@contextmanager
def no_more_memory():
    """The allocator has what it has reserved, and gets no more: nothing for a graph's own."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def many(k):
    """A batch whose graphs take more than what is left over."""
    return [x.repeat(20000, *[1] * (x.dim() - 1)) for x in tasks("mlp", k)]


def test_out_of_memory_leaves_it_usable():
    plain, loop = pair("mlp", backend="batched")
    for k in range(CALLS):  # a recording that must go on
        step(loop, tasks("mlp", k))
    for k in range(EAGER_CALLS):
        step(loop, many(k))
    loop.zero_grad(set_to_none=True)
    want, params = step(plain, many(0)), [p.detach().clone() for p in loop.parameters()]
    state = torch.cuda.get_rng_state()
    data = many(0)
    with no_more_memory():
        for _ in range(2):
            with pytest.raises(RuntimeError, match="cannot be recorded: CUDA out of memory"):
                loop(*data)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert all([p.grad is None for p in loop.parameters()])
    for a, b in zip(loop.parameters(), params, strict=True):
        assert torch.equal(a, b)
    earlier, failed = loop.recorder._known.values()
    assert (earlier.recording is None, failed.recording) == (False, None)
    compare(step(plain, tasks("mlp", 9)), step(loop, tasks("mlp", 9)))
    for _ in range(2):  # there is memory again: recorded, then replayed
        compare(want, step(loop, data))
    (recorded,) = [x for x in loop.recorder._known.values() if x is failed]
    assert recorded.recording is not None


def test_out_of_memory_is_told_once():
    plain, loop = pair("mlp", backend="batched")
    loop.capture = "auto"
    for k in range(EAGER_CALLS):
        step(loop, many(k))
    want, data = step(plain, many(0)), many(0)
    real = loop.recorder._graph

    def full(*arguments):
        graph = real(*arguments)
        record = graph.record

        def fails(body):
            def to_the_end():
                body()
                torch.empty(1 << 50, dtype=torch.uint8, device="cuda")  # no GPU has as much

            return record(to_the_end)

        graph.record = fails
        return graph

    loop.recorder._graph = full
    with pytest.warns(UserWarning, match="without CUDA graphs: .* out of memory"):
        compare(want, step(loop, data))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(want, step(loop, data))
    loop.recorder._graph = real
    compare(step(plain, tasks("mlp", 3)), step(loop, tasks("mlp", 3)))


def test_a_step_of_ones_own_without_memory():
    weight = torch.ones(4, device="cuda", requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    out_of_memory = []

    def run(x):
        weight.grad.zero_()
        loss = (x * weight).square().sum() * torch.rand((), device="cuda")
        loss.backward()
        if out_of_memory:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return loss

    x = torch.arange(4.0, device="cuda")
    replay = fastkfo.capture(run, [x])
    for _ in range(EAGER_CALLS):
        replay(x)
    before, state = weight.grad.clone(), torch.cuda.get_rng_state()
    out_of_memory.append(True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the step cannot be recorded: CUDA out"):
            replay(x)
        assert torch.equal(weight.grad, before)
        assert torch.equal(torch.cuda.get_rng_state(), state)
    out_of_memory.clear()
    for k in range(1, 4):
        loss = replay(k * x)
        torch.testing.assert_close(weight.grad, 2 * loss * x**2 * k**2 / (x * k).square().sum())


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
