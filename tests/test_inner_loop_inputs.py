"""What an inner loop may be called with, and what it must refuse, before anything is changed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from tests.batches import batch, learner, no_warnings
from tests.models import CLASSES, assert_close, build, snapshot, task


def ragged(sizes=(6, 4, 6, 5, 4)):
    """Tasks of unlike numbers of samples."""
    lists = [[], [], [], []]
    for t, size in enumerate(sizes):
        x_s, y_s, x_q, y_q = task("mlp", t)
        pieces = (x_s[:size], y_s[:size], x_q[: size - 2], y_q[: size - 2])
        for part, piece in zip(lists, pieces, strict=True):
            part.append(piece)
    return lists


@pytest.mark.parametrize("backend", ["batched", "loop"])
@pytest.mark.parametrize("options", [{}, {"memory": "adjoint"}, {"chunk_size": 1}], ids=str)
def test_tasks_of_unequal_shapes(options, backend):
    lists = ragged()
    ours = learner("mlp", "kron-psd")
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, 3, backend=backend, **options)
    with no_warnings():
        out = loop(*lists)
    out.loss.sum().backward()
    found = [p.grad for p in ours.parameters()]
    alone = learner("mlp", "kron-psd")
    one = fastkfo.InnerLoop(alone, F.cross_entropy, 3)
    assert isinstance(out.predictions, list)
    for t, parts in enumerate(zip(*lists, strict=True)):
        want = one(*[x.unsqueeze(0) for x in parts])
        want.loss.sum().backward()
        assert_close(out.loss[t].detach(), want.loss[0].detach())
        assert_close(out.predictions[t], want.predictions[0])
        assert_close(out.support_loss[t], want.support_loss[0])
    for a, p in zip(found, alone.parameters(), strict=True):
        assert_close(a, p.grad)
    assert out.finite.tolist() == [True] * 5


def test_lists_of_equal_shapes_are_one_group():
    lists = [list(x) for x in batch("mlp", 3)]
    ours = learner("mlp", "kron-psd")
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, 2)
    assert_close(loop(*lists).loss.detach(), loop(*batch("mlp", 3)).loss.detach())


class OfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, pair):
        x, scale = pair if isinstance(pair, tuple) else (pair["x"], pair["scale"])
        return {"logits": self.linear(x) * scale, "all": (x, scale)}


def of_two_loss(prediction, target):
    return F.cross_entropy(prediction["logits"], target["labels"]) + target["extra"].mean()


@pytest.mark.parametrize("make", [lambda x, s: (x, s), lambda x, s: {"x": x, "scale": s}])
@pytest.mark.parametrize(
    "path", [{}, {"memory": "adjoint"}, {"chunk_size": 2}, {"backend": "loop"}]
)
def test_pytrees(make, path):
    torch.manual_seed(0)
    model = OfTwo().double()
    x_s, y_s, x_q, y_q = batch("mlp", 3)
    scale = torch.rand(3, 6, 1, dtype=torch.float64)

    def target(y):
        return {"labels": y, "extra": y.double()}

    ours = fastkfo.algorithms.MAML(model, lr=0.1)
    loop = fastkfo.InnerLoop(ours, of_two_loss, 2, **path)
    out = loop(make(x_s, scale), target(y_s), make(x_q, scale[:, :5]), target(y_q))
    out.loss.sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    assert out.predictions["logits"].shape == (3, 5, CLASSES)
    model.zero_grad()
    for t in range(3):
        clone = ours.clone()
        for _ in range(2):
            seen = clone(make(x_s[t], scale[t]))
            clone.adapt(of_two_loss(seen, target(y_s[t])))
        of_two_loss(clone(make(x_q[t], scale[t, :5])), target(y_q[t])).backward()
    for a, p in zip(found, model.parameters(), strict=True):
        assert_close(a, p.grad)


def test_steps_of_a_call():
    loop = fastkfo.InnerLoop(learner("mlp", "kron-psd"), F.cross_entropy, 1)
    other = fastkfo.InnerLoop(learner("mlp", "kron-psd"), F.cross_entropy, 3)
    data = batch("mlp", 2)
    assert_close(loop(*data, steps=3).loss.detach(), other(*data).loss.detach())
    assert loop(*data, steps=0).support_loss.shape == (2, 0)


INIT = {
    "learner": ({"learner": nn.Linear(2, 2)}, TypeError, "learner: expected a GBML"),
    "loss": ({"loss": 3}, TypeError, "loss: expected a callable, got int"),
    "query_loss": ({"query_loss": "a"}, TypeError, "query_loss: expected a callable"),
    "steps": ({"steps": -1}, ValueError, "steps: expected at least 0, got -1"),
    "steps-type": ({"steps": 1.0}, TypeError, "steps: expected an int, got float"),
    "memory": ({"memory": "all"}, ValueError, "memory: expected one of .* got 'all'"),
    "buffers": ({"buffers": "x"}, ValueError, "buffers: expected one of .* got 'x'"),
    "chunk": ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1, got 0"),
    "backend": ({"backend": "x"}, ValueError, "backend: expected one of .* got 'x'"),
    "fused": ({"backend": "fused", "memory": "adjoint"}, ValueError, "backend: .*be fused"),
    "capture": ({"capture": "on"}, ValueError, "capture: expected one of .* got 'on'"),
    "features": ({"features": abs}, TypeError, "features: expected a module"),
    "first_order": ({"first_order": 1}, TypeError, "first_order: expected a bool"),
}


@pytest.mark.parametrize(("change", "error", "message"), INIT.values(), ids=INIT)
def test_bad_options(change, error, message):
    given = {"learner": learner("mlp", "kron-psd"), "loss": F.cross_entropy, "steps": 1} | change
    with pytest.raises(error, match=message):
        fastkfo.InnerLoop(given.pop("learner"), given.pop("loss"), given.pop("steps"), **given)


def test_options_that_a_learner_does_not_have():
    maml = fastkfo.algorithms.MAML(build("mlp"), lr=0.1)
    with pytest.raises(ValueError, match="adapt_transform: expected None, as MAML has no such"):
        fastkfo.InnerLoop(maml, F.cross_entropy, 1, adapt_transform=True)
    fastkfo.InnerLoop(maml, F.cross_entropy, 1, adapt_transform=False)(*batch("mlp", 2))


CALLS = {
    "other-tasks": (lambda s, a, q, b: (s, a, q[:2], b[:2]), {}, ValueError,
                    "x_q: expected 3 tasks as in x_s, got 2"),
    "other-targets": (lambda s, a, q, b: (s, a[:1], q, b), {}, ValueError,
                      "y_s: expected 3 tasks as in x_s, got 1"),
    "no-tasks": (lambda s, a, q, b: (s[:0], a[:0], q[:0], b[:0]), {}, ValueError,
                 "x_s: expected at least one task"),
    "empty-task": (lambda s, a, q, b: (s[:, :0], a[:, :0], q, b), {}, ValueError,
                   r"x_s: .*at least one sample, got shape \[3, 0, 4\]"),
    "no-axes": (lambda s, a, q, b: (s, a[:, 0], q, b), {}, ValueError,
                r"y_s: expected a shape \[T, S, ...\], got \[3\]"),
    "array": (lambda s, a, q, b: (s.numpy(), a, q, b), {}, TypeError,
              "x_s: expected a tensor .* got ndarray"),
    "no-query": (lambda s, a, q, b: (s, a, None, b), {}, TypeError, "x_q: expected query inputs"),
    "list-and-tensor": (lambda s, a, q, b: (list(s), a, list(q), b), {}, TypeError,
                        "y_s: expected a list of tasks as in x_s, got Tensor"),
    "list-lengths": (lambda s, a, q, b: (list(s), list(a)[:2], list(q), list(b)), {}, ValueError,
                     "y_s: expected a list of 3 tasks"),
    "empty-lists": (lambda s, a, q, b: ([], [], [], []), {}, ValueError, "at least one"),
    "labels": (lambda s, a, q, b: (s, a + 3, q, b), {}, ValueError,
               "y_s: expected labels from 0 to 2"),
    "steps": (lambda *x: x, {"steps": -1}, ValueError, "steps: expected at least 0, got -1"),
    "weights": (lambda *x: x, {"step_weights": [1.0]}, ValueError,
                r"step_weights: expected one weight for each of 2 steps .* got shape \[1\]"),
    "weights-type": (lambda *x: x, {"step_weights": 1.0}, TypeError,
                     "step_weights: expected a list"),
    "weights-nan": (lambda *x: x, {"step_weights": [1.0, float("nan")]}, ValueError,
                    "step_weights: expected a finite number"),
    "weights-alone": (lambda s, a, q, b: (s, a, q), {"step_weights": [1.0, 1.0]}, ValueError,
                      "step_weights: expected None without y_q"),
    "features": (lambda s, a, q, b: (s[..., :3], a, q[..., :3], b), {}, ValueError,
                 "expected inputs with 4 features"),
}  # fmt: skip


@pytest.mark.parametrize("path", [{}, {"memory": "adjoint"}, {"chunk_size": 1}], ids=str)
@pytest.mark.parametrize(("change", "options", "error", "message"), CALLS.values(), ids=CALLS)
def test_bad_calls_change_nothing(change, options, error, message, path):
    ours = learner("mlp", "kron-psd")
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, 2, **path)
    before = snapshot(ours)[:2]
    with pytest.raises(error, match=message):
        loop(*change(*batch("mlp", 3)), **options)
    assert snapshot(ours)[:2] == before


class Branching(nn.Module):
    """Control flow that depends on data: vmap cannot."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, CLASSES)

    def forward(self, x):
        y = self.inner(x)
        return y if y.sum() > 0 else 2 * y


def test_a_model_that_cannot_be_batched_falls_back_once():
    torch.manual_seed(0)
    ours = fastkfo.algorithms.MAML(nn.Sequential(Branching()).double(), lr=0.1)
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, 2)
    data = batch("mlp", 3)
    with pytest.warns(
        UserWarning, match=r"one after the other.*Branching \('0'\).*data-depend"
    ) as w:
        out = loop(*data)
    assert len(w) == 1
    with no_warnings():
        again = loop(*data)
    assert torch.equal(out.loss, again.loss)
    for t in range(3):
        clone = ours.clone()
        for _ in range(2):
            clone.adapt(F.cross_entropy(clone(data[0][t]), data[1][t]))
        assert_close(out.loss[t].detach(), F.cross_entropy(clone(data[2][t]), data[3][t]).detach())


def test_a_backend_by_name_does_not_fall_back():
    ours = fastkfo.algorithms.MAML(Branching().double(), lr=0.1)
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, 2, backend="batched")
    with pytest.raises(
        ValueError, match=r"backend: expected a model that can be batched.*Branching"
    ):
        loop(*batch("mlp", 3))
    with no_warnings():
        fastkfo.InnerLoop(ours, F.cross_entropy, 2, backend="loop")(*batch("mlp", 3))


class OwnUpdate(nn.Module):
    """A compute_update that is known by its interface alone."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, loss, parameters, create_graph=False, **options):
        grads = torch.autograd.grad(loss, parameters, create_graph=create_graph)
        return [self.scale * torch.tanh(g) for g in grads]


@pytest.mark.parametrize("backend", ["auto", "loop"])
def test_a_learner_known_by_its_methods_alone(backend):
    def made():
        return fastkfo.algorithms.GBML(build("mlp"), None, lr=0.1, compute_update=OwnUpdate())

    ours, looped = made(), made()
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, 2, backend=backend)
    x_s, y_s, x_q, y_q = batch("mlp", 3)
    if backend == "auto":
        with pytest.warns(UserWarning, match="compute_update is a OwnUpdate"):
            out = loop(x_s, y_s, x_q, y_q)
    else:
        out = loop(x_s, y_s, x_q, y_q)
    out.loss.sum().backward()
    for t in range(3):
        clone = looped.clone()
        for _ in range(2):
            clone.adapt(F.cross_entropy(clone(x_s[t]), y_s[t]))
        F.cross_entropy(clone(x_q[t]), y_q[t]).backward()
    for p, q in zip(ours.parameters(), looped.parameters(), strict=True):
        assert_close(p.grad, q.grad)
    for options in ({"memory": "adjoint"}, {"chunk_size": 1}, {"buffers": "frozen"}):
        with pytest.raises(
            ValueError, match=f"{next(iter(options))}: expected .* for this learner"
        ):
            fastkfo.InnerLoop(made(), F.cross_entropy, 2, **options)(x_s, y_s, x_q, y_q)


def test_a_subclass_with_an_adapt_of_its_own():
    class Half(fastkfo.algorithms.MAML):
        def clone(self, **options):
            clone = super().clone(**options)
            clone.lr = self.lr / 2
            return clone

    model = build("mlp")
    half = fastkfo.InnerLoop(Half(model, lr=0.2), F.cross_entropy, 2)
    plain = fastkfo.InnerLoop(fastkfo.algorithms.MAML(model, lr=0.1), F.cross_entropy, 2)
    data = batch("mlp", 3)
    with pytest.warns(UserWarning, match="Half has a method 'clone' of its own"):
        assert_close(half(*data).loss.detach(), plain(*data).loss.detach())
