"""`functional.inner_loop` on a GPU: the numbers of the CPU's kernels, without a synchronisation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.kernels import selector
from tests.inner_loop_cases import MODELS, TRANSFORMS, case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        selector.unavailable("native", "cuda", "inner_loop") is not None,
        reason="needs the CUDA library",
    ),
]


def results(device, cotangents, *arguments, adapted=False, **options):
    """Everything that comes of a case, on the CPU."""
    c = case(*arguments, device=device, **options)
    out = c(implementation="native", adapted=adapted)
    total = (out.loss * cotangents.to(out.loss)).sum()
    total = total + sum([(x * torch.cos(x.detach())).sum() for x in out.theta])
    grads = torch.autograd.grad(total, c.leaves(), allow_unused=True, materialize_grads=True)
    outputs = [out.loss, out.support_loss, out.predictions, out.statistics, *out.theta]
    return [x.detach().cpu() for x in (*outputs, *grads)]


def compare(*arguments, cotangents=None, **options):
    weights = torch.arange(options.get("tasks", 3)) - 0.5 if cotangents is None else cotangents
    found = [results(device, weights, *arguments, **options) for device in ("cuda", "cpu")]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model(model, transform, steps):
    try:
        compare(model, transform, steps=steps)
    except RuntimeError as error:
        if "bytes of shared memory" not in str(error):
            raise
        pytest.skip(str(error).splitlines()[0])


@pytest.mark.parametrize("form", ["dense", "factored", "gram"])
@pytest.mark.parametrize("transform", ["none", "psd", "factors", "scale", "all"])
@pytest.mark.parametrize(
    "options",
    [
        {"own": True},
        {"tasks": 133},
        {"tasks": 1},
        {"samples": 40, "queries": 2},
        {"first_order": True},
        {"loss": "mse", "reduction": "sum", "bias": False},
    ],
    ids=str,
)
def test_options(options, transform, form):
    compare("two layers", transform, form=form, **options)


def test_adapted_parameters():
    compare("two layers", "psd", adapted=True)


@pytest.mark.parametrize("transform", ["psd", "factors", "left"])
@pytest.mark.parametrize("model", ["head", "two layers", "sine"])
def test_adapted_transform(model, transform):
    compare(model, transform, adapt_transform=True)


def test_bitwise_repeatable():
    c = case("sine", "psd", loss="mse", tasks=40, dtype=torch.float32, device="cuda")
    found = []
    for _ in range(3):
        out = c()
        found.append([out.loss, *torch.autograd.grad(out.loss.sum(), c.leaves())])
    for again in found[1:]:
        assert all([torch.equal(a, b) for a, b in zip(found[0], again, strict=True)])


def test_a_bad_task_stays_alone():
    c = case("two layers", "psd", tasks=4, device="cuda")
    with torch.no_grad():
        c.data[0][2, 1, 0] = torch.nan
    out = c()
    assert out.finite.tolist() == [True, True, False, True]
    grads = torch.autograd.grad(out.loss.nansum(), c.leaves())
    assert all([x.isfinite().all() for x in grads[:-2]])


def test_a_label_out_of_range_marks_its_task():
    c = case("head", device="cuda")
    c.data[3][1, 0] = 17
    assert c().finite.tolist() == [True, False, True]


def learner():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)).cuda()
    update = fastkfo.optim.KroneckerTransform(fastkfo.nn.KroneckerLinear)
    return fastkfo.algorithms.GBML(model, transform=update, lr=0.1).cuda()


def tasks():
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2, 7, 10, 6, device="cuda", generator=g)
    y = torch.randint(5, (2, 7, 10), device="cuda", generator=g)
    return x[0], y[0], x[1], y[1]


def test_an_inner_loop_is_fused_and_waits_for_nothing():
    loop = fastkfo.InnerLoop(learner(), F.cross_entropy, steps=3, backend="fused")
    data = tasks()
    loop(*data).loss.sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop(*data).loss.mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_it_can_be_captured():
    loop = fastkfo.InnerLoop(learner(), F.cross_entropy, steps=3, backend="fused")
    data = tasks()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            loop.zero_grad(set_to_none=True)
            loop(*data).loss.mean().backward()
    torch.cuda.current_stream().wait_stream(side)
    want = [p.grad.clone() for p in loop.parameters() if p.grad is not None]
    loop.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop(*data).loss.mean().backward()
    graph.replay()
    found = [p.grad for p in loop.parameters() if p.grad is not None]
    assert len(found) == len(want)
    assert all([torch.equal(a, b) for a, b in zip(found, want, strict=True)])
