"""Large tasks, a few at a time, each with its gradient: the same as from graphs that are kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.inner_loop import prompt, run
from fastkfo.inner_loop.explain import lines
from fastkfo.inner_loop.inputs import Batch

TASKS, WAYS = 5, 3


@pytest.fixture(autouse=True)
def every_task_is_large(monkeypatch):
    monkeypatch.setattr(run, "LARGE_TASK", 1)


def model(dropout=0.0):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, WAYS),
    )  # fmt: skip


def data(dtype=torch.float64):
    torch.manual_seed(1)
    x = torch.randn(2, TASKS, 6, 2, 4, 4, dtype=dtype)
    y = torch.randint(WAYS, (2, TASKS, 6))
    return x[0], y[0], x[1], y[1]


def made(whole=False, dropout=0.0, **options):
    torch.manual_seed(0)
    kfo = fastkfo.optim.KroneckerTransform(fastkfo.nn.KroneckerLinear)
    learner = fastkfo.algorithms.GBML(model(dropout), transform=kfo, lr=0.1).double()
    loop = fastkfo.InnerLoop(learner, options.pop("loss", F.cross_entropy), 2, **options)
    if whole:
        loop.habit.why_not = "a test asks for kept graphs"
    return loop


def gradients(loop, combine=torch.sum, batch=None):
    torch.manual_seed(2)
    out = loop(*(batch or data()))
    combine(out.loss).backward()
    return out, [None if p.grad is None else p.grad.clone() for p in loop.parameters()]


def same(found, want):
    for a, b in zip(found, want, strict=True):
        assert (a is None) is (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.fixture
def pieces(monkeypatch):
    """How many pieces ran, forwards and again."""
    seen = []
    whole = prompt.Unrolled.whole

    def counted(way, run, leaves):
        seen.append(run.tasks)
        return whole(way, run, leaves)

    monkeypatch.setattr(prompt.Unrolled, "whole", counted)
    return seen


OPTIONS = {
    "plain": {},
    "first_order": {"first_order": True},
    "adapt": {"adapt_transform": True},
    "frozen_buffers": {"buffers": "frozen"},
    "own_buffers": {"buffers": "per_task"},
    "dropout": {"dropout": 0.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_same_as_one_graph(name, pieces):
    ours, one = made(**OPTIONS[name]), made(whole=True, **OPTIONS[name])
    (out, found), (want_out, want) = gradients(ours), gradients(one)
    assert max(pieces) < TASKS
    assert sum(pieces) == TASKS
    same(found, want)
    same([*out[:3:2], out.predictions], [*want_out[:3:2], want_out.predictions])
    same(ours.buffers(), one.buffers())


@pytest.mark.parametrize(
    "combine",
    [torch.mean, lambda x: -3 * x.sum(), lambda x: x.square().sum(), lambda x: x[1:3].sum()],
    ids=["mean", "multiple", "unequal", "some"],
)
def test_any_combination_of_the_losses(combine, pieces):
    ours, one = made(), made(whole=True)
    (_, found), (_, want) = gradients(ours, combine), gradients(one, combine)
    same(found, want)
    assert max(pieces) == prompt.IN_FLIGHT
    assert (ours.habit.misses == 1) is (sum(pieces) > TASKS)


def test_graphs_are_kept_where_gradients_were_of_no_use(pieces):
    ours, one = made(dropout=0.5), made(whole=True, dropout=0.5)

    def unequal(x):
        return x.square().sum()

    for k in range(prompt.MISSES + 1):
        pieces.clear()
        for loop in (ours, one):
            loop.zero_grad()
        (out, found), (want_out, want) = gradients(ours, unequal), gradients(one, unequal)
        same(found, want)  # the same draws, too
        assert torch.equal(out.loss, want_out.loss)
        assert (ours.habit.why_not is None) is (k + 1 < prompt.MISSES)
        assert bool(pieces) is (k < prompt.MISSES)


def test_float16_is_not_scaled_afterwards(pieces):
    loop = made()
    with torch.autocast("cpu", torch.float16):
        loop.float()(*data(torch.float32)).loss.sum().backward()
    assert pieces == []


def test_backward_twice_is_an_error():
    loss = made()(*data()).loss.sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_hooks_of_a_native_head_see_one_gradient():
    found = []
    for whole in (False, True):
        torch.manual_seed(0)
        base, head = model().double()[:-1], nn.Linear(16, WAYS).double()
        head.weight.register_hook(lambda g: 2 * g)
        learner = fastkfo.algorithms.MAML(head, lr=0.1)
        loop = fastkfo.InnerLoop(learner, F.cross_entropy, 2, features=base)
        if whole:
            loop.habit.why_not = "a test asks for kept graphs"
        found.append(gradients(loop)[1])
    same(*found)


def test_draws_are_repeated_for_unequal_losses():
    loops = [made(dropout=0.5) for _ in range(2)]
    weights = torch.linspace(1, 2, TASKS, dtype=torch.float64)
    (out, found), (want_out, _) = (
        gradients(loops[0], lambda x: (weights * x).sum()),
        gradients(loops[1]),
    )
    torch.testing.assert_close(out.loss, want_out.loss)
    rows = []
    for t in range(TASKS):  # gradients are linear in the losses' weights
        loop = made(dropout=0.5)
        rows.append(gradients(loop, lambda x, t=t: weights[t] * x[t])[1])
    same(found, [sum(g) for g in zip(*rows, strict=True)])


def test_differentiated_twice():
    found = []
    for whole in (False, True):
        loop = made(whole)
        params = [p for p in loop.parameters() if p.requires_grad]
        first = torch.autograd.grad(loop(*data()).loss.sum(), params, create_graph=True)
        total = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(total, params))
    same(*found)


def test_inputs_that_depend_on_what_is_learned():
    """The derivative in θ must not go through the images a second time."""
    found = []
    for whole in (False, True):
        loop = made(whole)
        x_s, y_s, x_q, y_q = data()
        scale = next(loop.parameters()).sum()
        out = loop(x_s * scale, y_s, x_q * scale, y_q)
        params = list(loop.parameters())
        first = torch.autograd.grad(out.loss.sum(), params, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), params))
    same(*found)


def test_gradients_of_inputs():
    found = []
    for whole in (False, True):
        x_s, y_s, x_q, y_q = data()
        x_s.requires_grad_(), x_q.requires_grad_()
        made(whole)(x_s, y_s, x_q, y_q).loss.sum().backward()
        found.append([x_s.grad, x_q.grad])
    same(*found)


def test_a_loss_that_closes_over_what_is_learned(pieces):
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    found = []
    for whole in (False, True):
        temperature.grad = None
        loop = made(whole, loss=lambda z, y: F.cross_entropy(z / temperature, y))
        _, grads = gradients(loop)
        found.append([*grads, temperature.grad])
        if not whole:
            assert "no arguments" in loop.habit.why_not
            assert len(pieces) == 1
    same(*found)


def test_a_nan_stays_in_its_task():
    x_s, y_s, x_q, y_q = data()
    x_s[1, 0, 0, 0, 0] = torch.nan
    found = []
    for whole in (False, True):
        out, grads = gradients(made(whole), batch=(x_s, y_s, x_q, y_q))
        assert out.finite.tolist() == [True, False, True, True, True]
        assert all(g.isfinite().all() for g in grads)
        found.append(grads)
    same(*found)


@pytest.mark.parametrize(
    "combine", [torch.mean, lambda x: x.square().sum()], ids=["mean", "squares"]
)
def test_features_and_a_native_head(combine):
    found = []
    for whole in (False, True):
        torch.manual_seed(0)
        base, head = model().double()[:-1], nn.Linear(16, WAYS).double()
        learner = fastkfo.algorithms.MAML(head, lr=0.1)
        loop = fastkfo.InnerLoop(learner, F.cross_entropy, 2, features=base)
        if whole:
            loop.habit.why_not = "a test asks for kept graphs"
        _, grads = gradients(loop, combine)
        found.append([*grads, *loop.buffers()])
        first = torch.autograd.grad(
            combine(loop(*data()).loss), list(loop.parameters()), create_graph=True
        )
        total = sum(g.square().sum() for g in first)
        found[-1] += torch.autograd.grad(total, list(loop.parameters()))
    same(*found)


def test_without_a_graph_nothing_is_computed_twice(pieces):
    loop = made()
    with torch.no_grad():
        loop(*data())
    assert pieces == []


def test_where_it_does_not_apply(pieces, monkeypatch):
    for options in ({"memory": "adjoint"}, {"chunk_size": 2}):
        gradients(made(**options))
    monkeypatch.setattr(run, "LARGE_TASK", 1 << 40)
    gradients(made())
    assert pieces == []


def test_explain():
    loop, batch = made(), Batch(*data()[:2])
    assert "2 tasks, each with its gradient" in "\n".join(lines(loop, batch))
    loop.habit.misses = prompt.MISSES
    loop.habit.miss()
    assert "2 tasks, their graphs kept (its losses had unequal" in "\n".join(lines(loop, batch))
