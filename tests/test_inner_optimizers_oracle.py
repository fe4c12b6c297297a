"""Inner optimizers against formulas, against higher and TorchOpt, and against differences."""

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F

import fastkfo
from fastkfo.optim.inner import SGD, Adam, RMSProp
from tests.batches import batch
from tests.inner_optimizer_cases import (
    CLIPS,
    OPTIMIZERS,
    agree,
    by_batch,
    by_formula,
    by_loop,
    found,
    inner_loop,
    learner,
)
from tests.models import LR, assert_close, build, perturb

pytestmark = pytest.mark.slow

STEPS = (1, 3, 5)
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["maml", "kfo"])
@every_optimizer
def test_the_formulas(name, kind, steps):
    ours, data = learner(kind=kind, inner_optimizer=OPTIMIZERS[name]), batch("mlp", 2)
    want = found(ours, by_formula(ours, steps, data))
    for run in (
        by_loop,
        by_batch,
        lambda *_: inner_loop(ours, steps, backend="batched")(*data).loss,
    ):
        agree(found(ours, run(ours, steps, data)), want)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each"])
@pytest.mark.parametrize("name", [None, "adam", "momentum"])
def test_rates_of_every_step_and_clipping(name, shared, clip):
    ours = learner(
        steps=3, shared=shared, inner_optimizer=OPTIMIZERS.get(name), **CLIPS[clip]
    )  # fmt: skip
    data = batch("mlp", 2)
    want = found(ours, by_formula(ours, 3, data))
    assert all(g.all() for n, g in want.grads.items() if n.startswith("lr."))
    for run in (by_loop, by_batch):
        agree(found(ours, run(ours, 3, data)), want)


@pytest.mark.parametrize("name", ["adam", "rmsprop-momentum", "nesterov"])
def test_a_convolutional_model(name):
    ours, data = learner("cnn", inner_optimizer=OPTIMIZERS[name]), batch("cnn", 2)
    want = found(ours, by_formula(ours, 3, data))
    for run in (by_loop, by_batch):
        agree(found(ours, run(ours, 3, data)), want, tol=1e-8)


def along(ours, losses, data, steps):
    """The slope of the sum of the losses along one direction, by central differences."""
    generator = torch.Generator().manual_seed(3)
    params = [p for p in ours.parameters() if p.requires_grad]
    way = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
    size, values = 3e-7, []  # its error is quadratic; of rounding there is 1e-9
    with torch.no_grad():
        for shift in (size, -2 * size, size):
            torch._foreach_add_(params, way, alpha=shift)
            with torch.enable_grad():
                values.append(losses(ours, steps, data).sum().item())
    return (values[0] - values[1]) / (2 * size), way


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("adapt", [False, True], ids=["fixed", "adapted"])
@every_optimizer
def test_central_differences(name, adapt, steps):
    ours = learner(
        steps=steps, shared=True, adapt_transform=adapt, inner_optimizer=OPTIMIZERS[name]
    )
    data = batch("mlp", 2)
    got = found(ours, by_batch(ours, steps, data))
    slope, way = along(ours, by_batch, data, steps)
    want = sum((g * w).sum() for g, w in zip(got.grads.values(), way, strict=True)).item()
    assert slope == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_central_differences_of_clipping(clip):
    ours, data = learner(inner_optimizer=OPTIMIZERS["adam"], **CLIPS[clip]), batch("mlp", 2)
    slope, way = along(ours, by_loop, data, 3)
    got = found(ours, by_loop(ours, 3, data))
    want = sum((g * w).sum() for g, w in zip(got.grads.values(), way, strict=True)).item()
    assert slope == pytest.approx(want, rel=1e-6)


# ours, what torch.optim calls it, its options; without eps, which higher adds elsewhere
PEERS = {
    "sgd": (SGD(momentum=0.9), torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (
        SGD(momentum=0.8, nesterov=True),
        torch.optim.SGD,
        {"momentum": 0.8, "nesterov": True},
    ),
    "dampening": (
        SGD(momentum=0.9, dampening=0.3),
        torch.optim.SGD,
        {"momentum": 0.9, "dampening": 0.3},
    ),
    "adam": (Adam(betas=(0.8, 0.99), eps=0), torch.optim.Adam, {"betas": (0.8, 0.99), "eps": 0}),
    "rmsprop": (RMSProp(eps=1e-2), torch.optim.RMSprop, {"alpha": 0.99, "eps": 1e-2}),
    "rmsprop-momentum": (
        RMSProp(alpha=0.9, eps=1e-2, momentum=0.5),
        torch.optim.RMSprop,
        {"alpha": 0.9, "eps": 1e-2, "momentum": 0.5},
    ),
}
every_peer = pytest.mark.parametrize(("ours", "cls", "options"), PEERS.values(), ids=PEERS)
TORCHOPT = {
    torch.optim.SGD: "MetaSGD",
    torch.optim.Adam: "MetaAdam",
    torch.optim.RMSprop: "MetaRMSProp",
}


def of_package(model, step_all, data):
    """The meta-gradient of a package that adapts a model in place."""
    total = 0.0
    for task in zip(*data, strict=True):
        total = total + step_all(model, *task)
    return torch.autograd.grad(total, list(model.parameters()))


@pytest.mark.parametrize("steps", STEPS)
@every_peer
def test_higher(ours, cls, options, steps):
    higher = pytest.importorskip("higher")
    model, data = perturb(build("mlp")), batch("mlp", 2)

    def step_all(model, x_s, y_s, x_q, y_q):
        optimizer = cls(model.parameters(), lr=LR, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of RMSProp's gradient where v is 0
            context = higher.innerloop_ctx(model, optimizer, copy_initial_weights=False)
            with context as (copy, step):
                for _ in range(steps):
                    step.step(F.cross_entropy(copy(x_s), y_s))
                return F.cross_entropy(copy(x_q), y_q)

    want = of_package(model, step_all, data)
    compare(model, ours, steps, data, want)


@pytest.mark.parametrize("steps", STEPS)
@every_peer
def test_torchopt(ours, cls, options, steps):
    torchopt = pytest.importorskip("torchopt")
    model, data = perturb(build("mlp")), batch("mlp", 2)

    def step_all(model, x_s, y_s, x_q, y_q):
        start = torchopt.extract_state_dict(model, by="reference")
        optimizer = getattr(torchopt, TORCHOPT[cls])(model, lr=LR, **options)
        for _ in range(steps):
            optimizer.step(F.cross_entropy(model(x_s), y_s))
        loss = F.cross_entropy(model(x_q), y_q)
        torchopt.recover_state_dict(model, start)
        return loss

    torch.set_default_dtype(torch.float64)  # in which its Adam computes the powers of betas
    try:
        want = of_package(model, step_all, data)
    finally:
        torch.set_default_dtype(torch.float32)
    compare(model, ours, steps, data, want)


def compare(model, optimizer, steps, data, want):
    maml = fastkfo.algorithms.MAML(model, lr=LR, inner_optimizer=optimizer)
    for run in (by_loop, by_batch):
        got = found(maml, run(maml, steps, data)).grads.values()
        for a, b in zip(got, want, strict=True):
            assert_close(a, b, tol=1e-9)


@every_peer
@pytest.mark.parametrize("clip", CLIPS)
def test_the_same_steps_as_torch_optim(ours, cls, options, clip):
    """θ itself, clipping included."""
    (x,), (y,) = (z[:1] for z in batch("mlp", 1)[:2])
    model, clips = perturb(build("mlp")), CLIPS[clip]
    clone = fastkfo.algorithms.MAML(model, lr=LR, inner_optimizer=ours, **clips).clone()
    theirs = perturb(build("mlp"))
    optimizer = cls(theirs.parameters(), lr=LR, **options)
    for _ in range(4):
        clone.adapt(F.cross_entropy(clone(x), y))
        optimizer.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        if clip == "norm":
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clips["clip_grad_norm"])
        with contextlib.suppress(KeyError):
            torch.nn.utils.clip_grad_value_(theirs.parameters(), clips["clip_grad_value"])
        optimizer.step()
    for p, q in zip(clone.parameters(), theirs.parameters(), strict=True):
        assert_close(p.detach(), q.detach(), tol=1e-12)
