"""`InnerLoop` against learn2learn's loop, in float64: every path, model, order and transform."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from tests.batches import batch, by_inner_loop, learner, no_warnings, oracle, without_zeros
from tests.cases import every_fifth
from tests.models import (
    CLASSES,
    LR,
    MODELS,
    TRANSFORMS,
    Outcome,
    assert_close,
    assert_same,
    build,
    collect,
    learner_of,
    perturb,
)
from tests.oracle import learn2learn

PATHS = {
    "full": {},
    "checkpoint": {"memory": "checkpoint"},
    "adjoint": {"memory": "adjoint"},
    "chunks": {"chunk_size": 3},
    "chunks-adjoint": {"chunk_size": 2, "memory": "adjoint"},
    "loop": {"backend": "loop"},
    "loop-checkpoint": {"backend": "loop", "memory": "checkpoint"},
    "loop-adjoint-chunks": {"backend": "loop", "memory": "adjoint", "chunk_size": 1},
}
OPTIONS = {
    "second": {},
    "first": {"first_order": True},
    "adapt": {"adapt_transform": True},
    "first-adapt": {"first_order": True, "adapt_transform": True},
}
SIZES = [(1, 0), (7, 0), (1, 1), (7, 1), (1, 5), (7, 5)]
NAMES = ["mlp", "cnn", "transformer", "tied", "unused", "frozen", "lstm", "scalar"]
# Small models are fused by default; these say so of both ways.
NAMED = PATHS | {"batched": {"backend": "batched"}}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def check(found, want):
    want = want._replace(adapted=[])
    found, grads = without_zeros(found, want)
    assert_same(found, want._replace(grads=grads))


def every_model():
    """Every model with every order on every path, with one of the sizes.

    They are dealt out such that any two of the four meet every value of the other two.
    """
    for (n, name), (o, option), (p, path) in itertools.product(
        enumerate(NAMES), enumerate(OPTIONS), enumerate(PATHS)
    ):
        yield name, option, path, *SIZES[(n + o + p) % len(SIZES)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "option", "path", "tasks", "steps"), list(every_model()))
@pytest.mark.filterwarnings("ignore:fastkfo. tasks run one after the other")
def test_every_model(name, option, path, tasks, steps):
    options = OPTIONS[option]
    found = by_inner_loop(name, "kron-psd", tasks, steps, PATHS[path], **options)
    check(found, oracle(name, "kron-psd", tasks, steps, **options))


@pytest.mark.parametrize(("transform", "option", "path"), every_fifth(TRANSFORMS, OPTIONS, NAMED))
def test_every_transform(transform, option, path):
    options = OPTIONS[option]
    with no_warnings():
        found = by_inner_loop("mlp", transform, 4, 3, NAMED[path], **options)
    check(found, oracle("mlp", transform, 4, 3, **options))


@every_path
@pytest.mark.parametrize("kind", ["MAML", "MetaSGD"])
def test_maml_and_meta_sgd(kind, path):
    def made(lib):
        own = getattr(lib.algorithms, kind)(build("cnn"), lr=LR)
        return perturb(own, size=0.01)

    def run_task(clone, t):
        x_s, y_s, x_q, y_q = (x[t] for x in batch("cnn", 4))
        for _ in range(2):
            clone.adapt(F.cross_entropy(clone(x_s), y_s))
        return F.cross_entropy(clone(x_q), y_q), ()

    theirs, ours = made(learn2learn()), made(fastkfo)
    want = collect(theirs, lambda t: run_task(theirs.clone(), t), 4)
    losses = fastkfo.InnerLoop(ours, F.cross_entropy, 2, **path)(*batch("cnn", 4)).loss
    losses.sum().backward()
    grads = {n: p.grad for n, p in ours.named_parameters()}
    assert_same(Outcome(list(losses.detach()), [], grads), want)


def features():
    """Convolutions with batch norms whose output a head adapts on."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Flatten(),
    ).double()  # fmt: skip


def head(lib, **options):
    torch.manual_seed(4)
    transform = lib.optim.KroneckerTransform(lib.nn.KroneckerLinear)
    model = nn.Linear(3, CLASSES).double()
    return perturb(lib.algorithms.GBML(model, transform, lr=LR, **options).double())


@every_path
@pytest.mark.parametrize("adapt", [False, True], ids=["fixed", "adapt"])
def test_features(adapt, path):
    """ANIL, as the KFO scripts do it: one pass over a task's support and query, then the head."""
    x_s, y_s, x_q, y_q = batch("cnn", 5)
    theirs, body = head(learn2learn(), adapt_transform=adapt), features()
    losses = []
    for t in range(5):
        seen_s, seen_q = body(torch.cat([x_s[t], x_q[t]])).split([len(x_s[t]), len(x_q[t])])
        clone = theirs.clone()
        for _ in range(3):
            clone.adapt(F.cross_entropy(clone(seen_s), y_s[t]))
        losses.append(F.cross_entropy(clone(seen_q), y_q[t]))
    torch.stack(losses).mean().backward()

    ours, own_body = head(fastkfo, adapt_transform=adapt), features()
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, 3, features=own_body, **path)
    found = loop(x_s, y_s, x_q, y_q).loss
    found.mean().backward()
    assert_close(found.detach(), torch.stack(losses).detach())
    want = [p.grad for m in (theirs, body) for p in m.parameters()]
    total = sum(g.square().sum() for g in want).sqrt().item()
    for p, g in zip([*ours.parameters(), *own_body.parameters()], want, strict=True):
        assert_close(p.grad, g, floor=1e-4 * total)


@every_path
@pytest.mark.parametrize("learned", [False, True], ids=["numbers", "learned"])
def test_a_query_loss_after_every_step(learned, path):
    """MAML++."""
    weights = torch.tensor([0.2, 0.5, 1.5], dtype=torch.float64, requires_grad=learned)
    x_s, y_s, x_q, y_q = batch("mlp", 4)
    theirs = learner_of(learn2learn(), "mlp", "kron-psd", adapt_transform=True)
    total = 0
    for t in range(4):
        clone = theirs.clone()
        for k in range(3):
            clone.adapt(F.cross_entropy(clone(x_s[t]), y_s[t]))
            total = total + weights[k] * F.cross_entropy(clone(x_q[t]), y_q[t])
    total.backward()
    of_weights, weights.grad = weights.grad, None

    ours = learner("mlp", "kron-psd", adapt_transform=True)
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, 3, **path)
    given = weights if learned else weights.tolist()
    found = loop(x_s, y_s, x_q, y_q, step_weights=given).loss.sum()
    found.backward()
    assert_close(found.detach(), total.detach())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(p.grad, q.grad)
    if learned:
        assert_close(weights.grad, of_weights)


@every_path
def test_gradients_reach_the_inputs_and_a_loss_with_parameters(path):
    class Learned(nn.Module):
        """A loss that is learned (as in ML³)."""

        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2 * CLASSES, 4), nn.Tanh(), nn.Linear(4, 1))

        def forward(self, logits, labels):
            unit = F.one_hot(labels, CLASSES).to(logits)
            return self.net(torch.cat([logits, unit], 1)).square().mean()

    def made():
        torch.manual_seed(5)
        inputs = [x.requires_grad_(x.is_floating_point()) for x in batch("mlp", 4)]
        return learner("mlp", "kron-psd"), Learned().double(), inputs

    a, loss_a, inputs_a = made()
    for t in range(4):
        x_s, y_s, x_q, y_q = (x[t] for x in inputs_a)
        clone = a.clone()
        for _ in range(2):
            clone.adapt(loss_a(clone(x_s), y_s))
        F.cross_entropy(clone(x_q), y_q).backward()

    b, loss_b, inputs_b = made()
    loop = fastkfo.InnerLoop(b, loss_b, 2, query_loss=F.cross_entropy, **path)
    assert {"loss.net.0.weight", "learner.module.0.weight"} <= set(dict(loop.named_parameters()))
    loop(*inputs_b).loss.sum().backward()
    mine = [*b.parameters(), *loss_b.parameters(), inputs_b[0], inputs_b[2]]
    theirs = [*a.parameters(), *loss_a.parameters(), inputs_a[0], inputs_a[2]]
    for p, q in zip(mine, theirs, strict=True):
        assert_close(p.grad, q.grad)


def test_adapt_returns_the_batched_learner():
    x_s, y_s, x_q, y_q = batch("mlp", 4)
    ours = learner("mlp", "kron-psd", adapt_transform=True)
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, 3)
    want = loop(x_s, y_s, x_q, y_q)
    adapted = loop.adapt(x_s, y_s)
    assert isinstance(adapted, fastkfo.BatchedLearner)
    assert_close(adapted(x_q).detach(), want.predictions)
    fastkfo.per_task(F.cross_entropy)(adapted(x_q), y_q).sum().backward()
    found = {n: p.grad for n, p in ours.named_parameters()}
    check(
        Outcome(list(want.loss.detach()), [], found),
        oracle("mlp", "kron-psd", 4, 3, adapt_transform=True),
    )


def test_adapt_to_features():
    x_s, y_s, x_q, _ = batch("cnn", 3)
    ours, body = head(fastkfo), features()
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, 2, features=body)
    adapted = loop.adapt(x_s, y_s)
    body.eval()
    for t in range(3):
        clone = ours.clone()
        seen = features()(x_s[t])  # a fresh extractor in training mode
        for _ in range(2):
            clone.adapt(F.cross_entropy(clone(seen), y_s[t]))
        on_query = body(x_q[t])
        assert_close(adapted.task(t)(on_query), clone(on_query))
    assert body[1].num_batches_tracked == 3


@every_path
def test_what_comes_out(path):
    x_s, y_s, x_q, y_q = batch("mlp", 4)
    ours = learner("mlp", "kron-psd")
    out = fastkfo.InnerLoop(ours, F.cross_entropy, 3, **path)(x_s, y_s, x_q, y_q)
    assert out.loss.shape == (4,)
    assert out.predictions.shape == (4, 5, CLASSES)
    assert out.support_loss.shape == (4, 3)
    assert out.finite.tolist() == [True] * 4
    assert not out.predictions.requires_grad
    assert not out.support_loss.requires_grad
    for t in range(4):
        clone = ours.clone()
        for k in range(3):
            loss = F.cross_entropy(clone(x_s[t]), y_s[t])
            assert_close(out.support_loss[t, k], loss.detach())
            clone.adapt(loss)
        assert_close(out.predictions[t], clone(x_q[t]).detach())


@pytest.mark.parametrize("name", list(MODELS))
def test_nothing_is_left_behind(name):
    """Neither `.grad`, nor a parameter or buffer of the learner is touched by the call itself."""
    ours = learner(name, "kron-psd").eval()
    before = {n: (id(t), t._version) for n, t in ours.state_dict(keep_vars=True).items()}
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, 2, backend="loop")
    loop(*batch(name, 2))
    after = {n: (id(t), t._version) for n, t in ours.state_dict(keep_vars=True).items()}
    assert after == before
    assert all(p.grad is None for p in ours.parameters())
