"""`clone(tasks=T)` against learn2learn's loop over T clones, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from tests.batches import batch, by_learner, learner, no_warnings, oracle, outcome, without_zeros
from tests.models import (
    LR,
    MODELS,
    TRANSFORMS,
    assert_close,
    assert_same,
    build,
    collect,
    learner_of,
    perturb,
    query_loss,
    support_loss,
)
from tests.oracle import learn2learn

OPTIONS = {
    "second": {},
    "first": {"first_order": True},
    "adapt": {"adapt_transform": True},
    "first-adapt": {"first_order": True, "adapt_transform": True},
}
RECURRENT = ("lstm", "gru")
BATCHED = [name for name in MODELS if name not in RECURRENT]
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def check(found, want):
    if not found.adapted:
        want = want._replace(adapted=[])
    found, grads = without_zeros(found, want)
    assert_same(found, want._replace(grads=grads))


@every_option
@pytest.mark.parametrize("name", BATCHED)
def test_every_model(name, options):
    with no_warnings():
        found = by_learner(name, "kron-psd", 3, 2, **options)
    check(found, oracle(name, "kron-psd", 3, 2, **options))


@every_option
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_transform(transform, options):
    with no_warnings():
        found = by_learner("cnn", transform, 2, 3, **options)
    check(found, oracle("cnn", transform, 2, 3, **options))


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("tasks", [1, 7])
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_numbers_of_tasks_and_steps(name, tasks, steps):
    check(by_learner(name, "kron-bias", tasks, steps), oracle(name, "kron-bias", tasks, steps))


@every_option
@pytest.mark.parametrize("name", RECURRENT)
def test_a_model_without_a_batched_form(name, options):
    with pytest.warns(UserWarning, match=r"task after task.*'rnn'.*[Bb]atching rule") as caught:
        found = by_learner(name, "kron-psd", 2, 2, **options)
    assert len(caught) == 1
    check(found, oracle(name, "kron-psd", 2, 2, **options))


def maml(lib, model, **options):
    return lib.algorithms.MAML(model, lr=LR, **options)


def meta_sgd(lib, model, **options):
    return perturb(lib.algorithms.MetaSGD(model, lr=LR, **options), size=0.01)


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("make", [maml, meta_sgd])
@pytest.mark.parametrize("name", ["mlp", "cnn", "tied"])
def test_maml_and_meta_sgd(name, make, first_order):
    if (name, make) == ("tied", meta_sgd):
        pytest.skip("learn2learn breaks ties here")

    def run_task(clone, t):
        for _ in range(3):
            clone.adapt(support_loss(clone, name, t))
        return query_loss(clone, name, t), ()

    theirs = make(learn2learn(), build(name), first_order=first_order)
    want = collect(theirs, lambda t: run_task(theirs.clone(), t), 3)
    ours = make(fastkfo, build(name), first_order=first_order)
    x_s, y_s, x_q, y_q = batch(name, 3)
    loss, clone = fastkfo.per_task(F.cross_entropy), ours.clone(tasks=3)
    for _ in range(3):
        clone.adapt(loss(clone(x_s), y_s))
    assert_same(outcome(ours, loss(clone(x_q), y_q)), want)


@pytest.mark.parametrize("transform", ["kron-psd", "none", "user"])
def test_a_learned_rate(transform):
    """Against our own loop: learn2learn gives a rate no gradient."""

    def made():
        own = learner_of(fastkfo, "mlp", transform)
        rate = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
        return fastkfo.algorithms.GBML(own.module, None, rate, compute_update=own.compute_update)

    def run_task(clone, t):
        for _ in range(3):
            clone.adapt(support_loss(clone, "mlp", t))
        return query_loss(clone, "mlp", t), ()

    looped, ours = made(), made()
    want = collect(looped, lambda t: run_task(looped.clone(), t), 3)
    clone, loss = ours.clone(tasks=3), fastkfo.per_task(F.cross_entropy)
    x_s, y_s, x_q, y_q = batch("mlp", 3)
    for _ in range(3):
        clone.adapt(loss(clone(x_s), y_s))
    found = outcome(ours, loss(clone(x_q), y_q))
    assert found.grads["lr"] is not None
    assert_same(found, want)


def test_options_of_a_call_and_of_the_clone():
    want = oracle("mlp", "kron-psd", 2, 2, first_order=True)
    x_s, y_s, x_q, y_q = batch("mlp", 2)
    loss = fastkfo.per_task(F.cross_entropy)
    for clone_options, adapt_options in (
        ({"first_order": True}, {}),
        ({}, {"first_order": True}),
    ):
        ours = learner("mlp", "kron-psd")
        clone = ours.clone(tasks=2, **clone_options)
        for _ in range(2):
            clone.adapt(loss(clone(x_s), y_s), **adapt_options)
        check(outcome(ours, loss(clone(x_q), y_q)), want)


def test_shapes_and_tasks():
    ours = learner("cnn", "kron-psd")
    clone = ours.clone(tasks=4)
    assert isinstance(clone, fastkfo.BatchedLearner)
    assert clone.tasks == 4
    pairs = zip(clone.module.parameters(), ours.module.parameters(), strict=True)
    for rows, p in pairs:
        assert rows.shape == (4, *p.shape)
    names = [n for n, _ in ours.module.named_parameters()]
    assert [n for n, _ in clone.module.named_parameters()] == names


def test_one_task_is_an_ordinary_module():
    ours = learner("cnn", "kron-psd")
    x_s, y_s, x_q, _ = batch("cnn", 3)
    clone = ours.clone(tasks=3)
    clone.adapt(fastkfo.per_task(F.cross_entropy)(clone(x_s), y_s))
    together = clone(x_q)
    for t in (0, 2, -1):
        one = clone.task(t)
        assert type(one) is type(ours.module)
        assert_close(one(x_q[t]), together[t])
        one(x_q[t]).sum().backward(retain_graph=True)
    with pytest.raises(IndexError, match="index: expected a task below 3, got 3"):
        clone.task(3)
    assert next(ours.module.parameters()).grad is not None


class TwoInputs(nn.Module):
    """Several inputs by position and by name, several outputs, a number that is no tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x, *, other, power=1):
        h = self.a(x["x"]) ** power + self.b(other[0])
        return {"logits": h, "norm": h.square().sum(-1)}


def test_inputs_and_outputs_of_any_structure():
    torch.manual_seed(0)
    model = TwoInputs().double()
    ours = fastkfo.algorithms.MAML(model, lr=0.1)
    x, other = torch.randn(3, 5, 4).double(), torch.randn(3, 5, 2).double()
    clone = ours.clone(tasks=3)
    found = clone({"x": x}, other=(other,), power=2)
    for t in range(3):
        want = model({"x": x[t]}, other=(other[t],), power=2)
        for key, value in want.items():
            assert_close(found[key][t], value)
    clone.adapt(found["norm"].mean(1))
    with pytest.raises(ValueError, match=r"inputs: expected 3 tasks.*got shape \[2, 5, 4\]"):
        clone({"x": x[:2]}, other=(other,))


BAD_LOSSES = {
    "number": (lambda x: 0.5, TypeError, "loss: expected a tensor, got float"),
    "scalar": (lambda x: x.mean(), ValueError, r"shape \[3\], got a scalar.*fastkfo.per_task"),
    "matrix": (lambda x: x[:, 0], ValueError, r"expected one loss per task.*got shape \[3, 3\]"),
    "other-tasks": (lambda x: x[:2, 0, 0], ValueError, r"shape \[3\], got shape \[2\]"),
    "detached": (lambda x: x[:, 0, 0].detach(), ValueError, "with a graph"),
}


@pytest.mark.parametrize(("bad", "error", "message"), BAD_LOSSES.values(), ids=BAD_LOSSES)
def test_bad_losses_leave_the_learner_alone(bad, error, message):
    clone = learner("mlp", "kron-psd", adapt_transform=True).clone(tasks=3)
    x_s, y_s, _, _ = batch("mlp", 3)
    for _ in range(2):
        before = [id(p) for p in clone.module.parameters()]
        with pytest.raises(error, match=message):
            clone.adapt(bad(clone(x_s)))
        assert [id(p) for p in clone.module.parameters()] == before
        clone.adapt(fastkfo.per_task(F.cross_entropy)(clone(x_s), y_s))


def test_bad_clones():
    ours = learner("mlp", "kron-psd")
    with pytest.raises(TypeError, match="tasks: expected an int, got float"):
        ours.clone(tasks=2.0)
    with pytest.raises(ValueError, match="tasks: expected at least 1, got 0"):
        ours.clone(tasks=0)
    with pytest.raises(ValueError, match=r"buffers: expected one of .*got 'own'"):
        ours.clone(tasks=2, buffers="own")
    own = fastkfo.algorithms.GBML(build("mlp"), None, compute_update=nn.Identity())
    with pytest.raises(ValueError, match=r"tasks: .*compute_update is a Identity"):
        own.clone(tasks=2)


def test_hints_for_frozen_and_unused_parameters():
    for name, hint in (("frozen", "allow_nograd=True"), ("unused", "allow_unused=True")):
        clone = learner_of(fastkfo, name, "kron-psd").clone(tasks=2)
        x_s, y_s, _, _ = batch(name, 2)
        loss = fastkfo.per_task(F.cross_entropy)(clone(x_s), y_s)
        with pytest.raises(RuntimeError, match=hint):
            clone.adapt(loss)
