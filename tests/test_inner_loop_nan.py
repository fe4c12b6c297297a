"""A NaN or an infinity stays in its task: neither the others nor what is shared sees it."""

import pytest
import torch
import torch.nn.functional as F

import fastkfo
from tests.batches import batch, learner
from tests.cases import every_fifth
from tests.models import LR, assert_close, build
from tests.test_inner_loop import PATHS, features, head

KEPT = torch.tensor([0, 2, 3])
OPTIONS = {"second": {}, "first": {"first_order": True}, "adapt": {"adapt_transform": True}}


def spoiled(name, where, bad):
    """Four tasks; one number of the second is bad."""
    data = [x.clone() for x in batch(name, 4)]
    data[{"support": 0, "query": 2}[where]][1, 2].view(-1)[0] = bad
    return data


def good(name):
    return [x[KEPT] for x in batch(name, 4)]


def compare(parameters, others, out, want, masked):
    assert out.finite.tolist() == [True, False, True, True]
    assert_close(out.loss[KEPT].detach(), want.loss.detach())
    assert_close(out.predictions[KEPT], want.predictions)
    want.loss.sum().backward()
    (out.loss[out.finite] if masked else out.loss).sum().backward()
    total = sum(p.grad.square().sum() for p in others if p.grad is not None).sqrt().item()
    for p, q in zip(parameters, others, strict=True):
        assert_close(p.grad, q.grad, floor=1e-4 * total)


@pytest.mark.parametrize(
    ("path", "option", "where", "masked"),
    every_fifth(PATHS, OPTIONS, ["support", "query"], [True, False]),
)
def test_one_bad_task(path, option, where, masked):
    a, b = (learner("mlp", "kron-psd", **OPTIONS[option]) for _ in range(2))
    loops = [fastkfo.InnerLoop(x, F.cross_entropy, 3, **PATHS[path]) for x in (a, b)]
    out, want = loops[0](*spoiled("mlp", where, float("nan"))), loops[1](*good("mlp"))
    compare([*a.parameters()], [*b.parameters()], out, want, masked)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf")])
@pytest.mark.parametrize("path", [{}, {"memory": "adjoint"}], ids=["full", "adjoint"])
def test_infinities(path, bad):
    a, b = (learner("mlp", "kron-psd") for _ in range(2))
    loops = [fastkfo.InnerLoop(x, F.cross_entropy, 3, **path) for x in (a, b)]
    out, want = loops[0](*spoiled("mlp", "support", bad)), loops[1](*good("mlp"))
    compare([*a.parameters()], [*b.parameters()], out, want, masked=True)


@pytest.mark.parametrize("transform", ["kron-bias", "mixture", "user", "module", "scale", "none"])
@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_models_and_transforms(name, transform):
    a, b = (learner(name, transform) for _ in range(2))
    loops = [fastkfo.InnerLoop(x, F.cross_entropy, 3) for x in (a, b)]
    out, want = loops[0](*spoiled(name, "support", float("nan"))), loops[1](*good(name))
    compare([*a.parameters()], [*b.parameters()], out, want, masked=False)


@pytest.mark.parametrize("kind", ["MAML", "MetaSGD"])
def test_maml_and_meta_sgd(kind):
    a, b = (getattr(fastkfo.algorithms, kind)(build("cnn"), lr=LR) for _ in range(2))
    loops = [fastkfo.InnerLoop(x, F.cross_entropy, 3) for x in (a, b)]
    out, want = loops[0](*spoiled("cnn", "support", float("nan"))), loops[1](*good("cnn"))
    compare([*a.parameters()], [*b.parameters()], out, want, masked=False)


def test_a_learned_rate():
    def made():
        own = learner("mlp", "kron-psd")
        lr = torch.nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
        return fastkfo.algorithms.GBML(own.module, None, lr, compute_update=own.compute_update)

    a, b = made(), made()
    loops = [fastkfo.InnerLoop(x, F.cross_entropy, 3) for x in (a, b)]
    out, want = loops[0](*spoiled("mlp", "support", float("nan"))), loops[1](*good("mlp"))
    compare([*a.parameters()], [*b.parameters()], out, want, masked=False)


@pytest.mark.parametrize("where", ["support", "query"])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_features_of_a_bad_task(path, where):
    learners, bodies = [head(fastkfo) for _ in range(2)], [features() for _ in range(2)]
    loops = [
        fastkfo.InnerLoop(x, F.cross_entropy, 3, features=body, **path)
        for x, body in zip(learners, bodies, strict=True)
    ]
    out, want = loops[0](*spoiled("cnn", where, float("nan"))), loops[1](*good("cnn"))
    compare([*loops[0].parameters()], [*loops[1].parameters()], out, want, masked=False)
    pairs = zip(bodies[0].named_buffers(), bodies[1].buffers(), strict=True)
    for (name, x), y in pairs:
        if "num_batches" not in name:
            assert_close(x, y, what=name)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_task_that_diverges_on_the_way(path):
    """Infinite only after some steps: what it had done before is left out as well."""

    def made():
        torch.manual_seed(0)
        kron = fastkfo.optim.KroneckerTransform(fastkfo.nn.KroneckerLinear, bias=True)
        return fastkfo.algorithms.GBML(torch.nn.Linear(4, 3).double(), kron, lr=0.1).double()

    x_s, y_s, x_q, y_q = (x.clone() for x in batch("mlp", 4))
    y_s, y_q = (F.one_hot(y, 3).double() for y in (y_s, y_q))
    x_s[1] *= 1e40
    a, b = made(), made()
    out = fastkfo.InnerLoop(a, F.mse_loss, 4, **path)(x_s, y_s, x_q, y_q)
    good = [x[KEPT] for x in (x_s, y_s, x_q, y_q)]
    want = fastkfo.InnerLoop(b, F.mse_loss, 4, **path)(*good)
    assert out.support_loss[1].isfinite().tolist() == [True, True, False, False]
    compare([*a.parameters()], [*b.parameters()], out, want, masked=False)


def test_of_a_batched_learner():
    a, b = (learner("cnn", "kron-psd") for _ in range(2))
    loss, losses = fastkfo.per_task(F.cross_entropy), []
    for own, data in ((a, spoiled("cnn", "support", float("nan"))), (b, good("cnn"))):
        clone = own.clone(tasks=len(data[0]))
        for _ in range(2):
            clone.adapt(loss(clone(data[0]), data[1]))
        losses.append(loss(clone(data[2]), data[3]))
    assert losses[0].isfinite().tolist() == [True, False, True, True]
    losses[0][losses[0].isfinite()].sum().backward()
    losses[1].sum().backward()
    total = sum(p.grad.square().sum() for p in b.parameters()).sqrt().item()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert_close(p.grad, q.grad, floor=1e-4 * total)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_zero_weight_leaves_nothing(path):
    """Not even the infinite second derivative of a square root at zero."""

    def loss(prediction, target):
        return ((prediction - target).square().sum(1) + 0.0).sqrt().mean()

    torch.manual_seed(0)
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    model = torch.nn.Linear(2, 2).double()
    y = model(x).detach() + torch.randn(3, 4, 2, dtype=torch.float64)
    y[1] = model(x[1]).detach()  # a perfect fit: √0
    kron = fastkfo.optim.KroneckerTransform(fastkfo.nn.KroneckerLinear)
    ours = fastkfo.algorithms.GBML(model, kron, lr=0.1)
    loop = fastkfo.InnerLoop(ours, loss, 2, **path)
    (loop(x, y, x, y).loss * torch.tensor([1.0, 0.0, 1.0])).sum().backward()
    found = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    keep = torch.tensor([0, 2])
    loop(x[keep], y[keep], x[keep], y[keep]).loss.sum().backward()
    for a, p in zip(found, ours.parameters(), strict=True):
        assert_close(a, p.grad)
