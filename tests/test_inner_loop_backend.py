"""`InnerLoop(backend="fused")`: the numbers of the other backends, and when it is taken."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo import InnerLoop
from fastkfo.algorithms import GBML, MAML, MetaSGD
from fastkfo.optim import KroneckerTransform, MetaCurvatureTransform
from tests.cases import needs_native
from tests.inner_loop_cases import MODELS, layers_of, module_of

pytestmark = needs_native


def kronecker(psd, bias=True):
    return KroneckerTransform(fastkfo.nn.KroneckerLinear, bias=bias, psd=psd)


LEARNERS = {
    "maml": lambda m: MAML(m, lr=0.1),
    "first order": lambda m: MAML(m, lr=0.1, first_order=True),
    "meta-sgd": lambda m: MetaSGD(m, lr=0.1),
    "kfo": lambda m: GBML(m, transform=kronecker(True), lr=0.1),
    "not psd": lambda m: GBML(m, transform=kronecker(False), lr=0.1),
    "adapted": lambda m: GBML(m, transform=kronecker(True), lr=0.1, adapt_transform=True),
    "adapted, first order": lambda m: GBML(
        m, transform=kronecker(False), lr=0.1, adapt_transform=True, first_order=True
    ),
    "no bias": lambda m: GBML(m, transform=kronecker(True, bias=False), lr=0.1),
    "scale": lambda m: GBML(m, transform=lambda p: fastkfo.nn.Scale(p.shape), lr=0.1),
    "curvature": lambda m: GBML(m, transform=MetaCurvatureTransform, lr=0.1),
    "learned rate": lambda m: GBML(
        m, transform=kronecker(True), lr=nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    ),
}


def module(name):
    features, model = MODELS[name]
    layers, shapes = layers_of(features, model)
    g = torch.Generator().manual_seed(0)
    theta = [torch.randn(s, generator=g, dtype=torch.float64) / max(s) ** 0.5 for s in shapes]
    theta = [x + (i % 2 if "norm" in name else 0) for i, x in enumerate(theta)]
    return module_of(layers, theta)


def made(name, kind):
    torch.manual_seed(0)
    learner = LEARNERS[kind](module(name)).double()
    with torch.no_grad():
        for p in learner.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return learner


def tasks(name, count=4, samples=6, queries=5):
    features, model = MODELS[name]
    classes = [x for x in model if isinstance(x, int)][-1]
    g = torch.Generator().manual_seed(1)
    x_s = torch.randn(count, samples, features, generator=g, dtype=torch.float64)
    x_q = torch.randn(count, queries, features, generator=g, dtype=torch.float64)
    y_s = torch.randint(classes, (count, samples), generator=g)
    return x_s, y_s, x_q, torch.randint(classes, (count, queries), generator=g)


def outcome(inner_loop, data, **options):
    """Everything that a call leaves behind."""
    out = inner_loop(*data, **options)
    out.loss.mean().backward()
    learner = inner_loop.learner
    grads = {n: p.grad for n, p in learner.named_parameters()}
    return [out.loss, out.predictions, out.support_loss], grads, list(learner.buffers())


def same(found, want):
    for a, b in zip(found[0], want[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    largest = max([float(g.abs().max()) for g in want[1].values() if g is not None])
    for name, g in want[1].items():
        mine = found[1][name]
        g = torch.zeros_like(mine) if g is None else g
        torch.testing.assert_close(mine, g, rtol=1e-9, atol=1e-9 * largest, msg=name)
    for a, b in zip(found[2], want[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("name", MODELS)
def test_every_backend_agrees(name, kind):
    data = tasks(name)
    want = outcome(InnerLoop(made(name, kind), F.cross_entropy, 3, backend="batched"), data)
    same(outcome(InnerLoop(made(name, kind), F.cross_entropy, 3, backend="fused"), data), want)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("buffers", ["shared", "frozen", "per_task"])
def test_running_statistics(buffers, momentum):
    data, found = tasks("batch norm"), []
    for backend in ("fused", "loop"):
        learner = made("batch norm", "kfo")
        learner.module[1].momentum = momentum
        inner_loop = InnerLoop(learner, F.cross_entropy, 2, backend=backend, buffers=buffers)
        inner_loop(*data)
        found.append(outcome(inner_loop, data))
    same(*found)


def test_losses():
    x_s, y_s, x_q, y_q = tasks("two layers")
    numbers = [F.one_hot(y, 4).double() for y in (y_s, y_q)]
    both = {
        nn.CrossEntropyLoss(reduction="sum"): (y_s, y_q),
        nn.MSELoss(): numbers,
        F.mse_loss: numbers,
        nn.MSELoss(reduction="sum"): numbers,
    }
    for loss, (a, b) in both.items():
        found = [
            outcome(
                InnerLoop(made("two layers", "kfo"), loss, 2, first_order=None, backend=backend),
                (x_s, a, x_q, b),
            )
            for backend in ("fused", "batched")
        ]
        same(*found)


def test_features_train_through_it():
    data, found = tasks("two layers"), []
    for backend in ("fused", "batched"):
        torch.manual_seed(0)
        features = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()).double()
        learner = made("two layers", "kfo")
        inner_loop = InnerLoop(learner, F.cross_entropy, 2, features=features, backend=backend)
        values, grads, buffers = outcome(inner_loop, data)
        grads |= {f"features.{n}": p.grad for n, p in features.named_parameters()}
        found.append((values, grads, [*buffers, *features.buffers()]))
    same(*found)


def test_lists_of_unlike_tasks():
    parts = [tasks("head", 2, 6, 5), tasks("head", 1, 3, 2), tasks("head", 1, 6, 5)]
    data = [[row for part in parts for row in part[k]] for k in range(4)]
    found = []
    for backend in ("fused", "batched"):
        inner_loop = InnerLoop(made("head", "kfo"), F.cross_entropy, 2, backend=backend)
        values, grads, buffers = outcome(inner_loop, data)
        found.append(([values[0], *values[1], values[2]], grads, buffers))
    same(*found)


def test_the_adapted_learner():
    x_s, y_s, x_q, y_q = tasks("two layers")
    found = []
    for backend in ("fused", "batched"):
        learner = made("two layers", "kfo")
        inner_loop = InnerLoop(learner, F.cross_entropy, 3, backend=backend)
        adapted = inner_loop.adapt(x_s, y_s)
        adapted.adapt(fastkfo.per_task(F.cross_entropy)(adapted(x_s), y_s))  # goes on from there
        loss = fastkfo.per_task(F.cross_entropy)(adapted(x_q), y_q)
        loss.mean().backward()
        grads = {n: p.grad for n, p in learner.named_parameters()}
        found.append(([loss, *adapted.parameters()], grads, []))
        assert adapted.task(1)(x_q[1]).shape == (5, 4)
    same(*found)


def test_inputs_of_more_axes_are_flattened():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    x_s, x_q = torch.randn(2, 4, 5, 3, 4, dtype=torch.float64)
    y = torch.arange(5).expand(4, 5) % 3
    losses = [
        InnerLoop(MAML(copy.deepcopy(model), 0.1), F.cross_entropy, 2, backend=backend)(
            x_s, y, x_q, y
        ).loss
        for backend in ("fused", "batched")
    ]
    torch.testing.assert_close(*losses)


def test_the_networks_of_the_package():
    """Whose parameters do not lie in the order of the forward pass."""
    x = torch.randn(2, 3, 5, 1, 4, 4, dtype=torch.float64)
    y = torch.arange(5).expand(3, 5) % 3
    model = fastkfo.vision.models.OmniglotFC(16, 3, sizes=[7, 6]).double()
    ours = GBML(model, transform=kronecker(True), lr=0.1)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.02 * torch.randn_like(p))
    found = []
    for backend in ("fused", "batched"):
        learner = copy.deepcopy(ours)
        inner_loop = InnerLoop(learner, F.cross_entropy, 3, backend=backend)
        found.append(outcome(inner_loop, (x[0], y, x[1], y)))
    same(*found)


CHANGES = {
    "rate": lambda il: setattr(il.learner, "lr", 0.3),
    "order": lambda il: setattr(il.learner, "first_order", True),
    "weight": lambda il: setattr(
        il.learner.module[0], "weight", nn.Parameter(torch.ones(17, 3, dtype=torch.float64))
    ),
    "values": lambda il: il.learner.module[0].weight.data.mul_(2),
    "activation": lambda il: il.learner.module.__setitem__(1, nn.Tanh()),
    "slope": lambda il: il.learner.module.__setitem__(1, nn.LeakyReLU(0.5)),
    "psd": lambda il: [setattr(m, "psd", False) for m in il.learner.modules() if hasattr(m, "psd")],
    "factor": lambda il: next(
        m for m in il.learner.modules() if hasattr(m, "psd")
    ).left.data.mul_(1.5),
    "hook": lambda il: il.learner.module[0].register_forward_hook(lambda m, i, o: 2 * o),
    "loss": lambda il: setattr(il, "query_loss", fastkfo.per_task(lambda p, y: p.square().mean())),
    "steps": lambda il: setattr(il, "steps", 1),
    "forward": lambda il: setattr(il.learner.module[1], "forward", torch.sin),
    "dropout": lambda il: il.learner.module.append(nn.Dropout(0.0)),
    "class": lambda il: setattr(il.learner.module[1], "__class__", nn.Tanh),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    data, found = tasks("two layers"), []
    for backend in ("auto", "batched"):
        inner_loop = InnerLoop(made("two layers", "kfo"), F.cross_entropy, 2, backend=backend)
        inner_loop(*data)
        CHANGES[change](inner_loop)
        found.append(outcome(inner_loop, data))
    same(*found)


def test_a_change_of_an_attribute_is_seen():
    data = tasks("leaky")
    inner_loop = InnerLoop(made("leaky", "maml"), F.cross_entropy, 2, backend="fused")
    before = inner_loop(*data).loss
    inner_loop.learner.module[1].negative_slope = 0.9
    want = InnerLoop(inner_loop.learner, F.cross_entropy, 2, backend="batched")(*data).loss
    assert not torch.allclose(before, want)
    torch.testing.assert_close(inner_loop(*data).loss, want)


def test_copies_and_pickles():
    data = tasks("head")
    inner_loop = InnerLoop(made("head", "kfo"), F.cross_entropy, 2)
    want = outcome(inner_loop, data)
    for made_of in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        twin = made_of(inner_loop)
        twin.zero_grad()
        same(outcome(twin, data), want)


def test_no_grad_and_inference_mode():
    data = tasks("head")
    inner_loop = InnerLoop(made("head", "kfo"), F.cross_entropy, 2, backend="fused")
    want = inner_loop(*data).loss.detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = inner_loop(*data)
        assert not out.loss.requires_grad
        torch.testing.assert_close(out.loss, want)


class Other(nn.Module):
    def forward(self, x):
        return x


REASONS = {
    "Other ('1', layer 2) is not a layer that is known": nn.Sequential(
        nn.Linear(3, 4), Other(), nn.Linear(4, 4)
    ),
    "Dropout ('1', layer 2) draws random numbers": nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)),
    "BatchNorm1d ('1', layer 2) uses its running statistics": nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4)
    ).eval(),
    "Linear ('1', layer 2) takes 5 features, but 4 come in": nn.Sequential(
        nn.Linear(3, 4), nn.Linear(5, 4)
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_cannot_be_fused_is_named(reason):
    learner = MAML(REASONS[reason], 0.1)
    with pytest.raises(ValueError, match="backend: expected an inner loop that can be fused") as e:
        InnerLoop(learner, F.cross_entropy, 1, backend="fused")
    assert reason in str(e.value)
    assert InnerLoop(learner, F.cross_entropy, 1).why_not_fused() == reason


def test_more_reasons():
    def reason(learner, loss=F.cross_entropy, **options):
        return InnerLoop(learner, loss, 1, **options).why_not_fused()

    learner = made("two layers", "kfo")
    assert "memory" in reason(learner, memory="adjoint")
    assert "chunk_size" in reason(learner, chunk_size=2)
    assert "loss is neither" in reason(learner, F.l1_loss)
    curvature = made("two layers", "curvature")
    assert "meta-curvature is not adapted" in reason(curvature, adapt_transform=True)
    learned = made("two layers", "learned rate")
    assert "a learned rate" in reason(learned, adapt_transform=True)
    assert "backend='loop'" in reason(learner, backend="loop")
    squares = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
    one = fastkfo.optim.ReshapedTransform(fastkfo.nn.KroneckerLinear(4, 4), (-1, 4, 4)).double()
    shared = GBML(squares, transform=lambda p: one, lr=0.1)
    assert "share a transform" in reason(shared, adapt_transform=True)
    other = fastkfo.optim.ReshapedTransform(fastkfo.nn.KroneckerLinear(2, 8), (-1, 2, 8)).double()
    assert "another shape" in reason(GBML(squares, transform=lambda p: other, lr=0.1))
    tied = module("no activation")
    tied[1].bias = nn.Parameter(torch.zeros(4).double())
    tied[1].weight.requires_grad_(False)
    assert "requires no gradient" in reason(MAML(tied, 0.1))
    square = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    square[1].weight = square[0].weight
    assert "shared by two layers" in reason(MAML(square, 0.1))
    mixed = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double())
    assert "not all float32" in reason(MAML(mixed, 0.1))


def test_labels_that_do_not_count_and_autocast_take_another_path():
    x_s, y_s, x_q, y_q = tasks("head")
    some = y_s.clone()
    some[0, 1] = -100
    inner_loop = InnerLoop(made("head", "kfo"), F.cross_entropy, 2)
    want = InnerLoop(made("head", "kfo"), F.cross_entropy, 2, backend="batched")
    torch.testing.assert_close(inner_loop(x_s, some, x_q, y_q).loss, want(x_s, some, x_q, y_q).loss)
    fused = InnerLoop(made("head", "kfo"), F.cross_entropy, 2, backend="fused")
    with pytest.raises(ValueError, match=r"backend: .* y_s has labels that do not count"):
        fused(x_s, some, x_q, y_q)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        fused(x_s, y_s, x_q, y_q)


def test_one_optimizer_step_after_the_other():
    """As a training loop has it: the same learner, other values, other data."""
    losses = []
    for backend in ("fused", "batched"):
        inner_loop = InnerLoop(made("two layers", "kfo"), F.cross_entropy, 2, backend=backend)
        optimizer = torch.optim.Adam(inner_loop.parameters(), 0.01)
        for samples in (6, 6, 3):
            optimizer.zero_grad()
            loss = inner_loop(*tasks("two layers", 4, samples)).loss.mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-8, atol=0)
