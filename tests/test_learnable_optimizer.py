"""LearnableOptimizer equals learn2learn's over several steps, in float64."""

import copy

import pytest
import torch
from torch import nn

import fastkfo
from fastkfo.optim import LearnableOptimizer
from tests.models import (
    LR,
    TRANSFORMS,
    assert_close,
    build,
    perturb,
    snapshot,
    support_loss,
    task,
)
from tests.oracle import learn2learn

l2l = learn2learn()


def optimizer_of(lib, name, transform, lr=LR):
    model = build(name)
    made = TRANSFORMS[transform](lib, model)
    return model, perturb(lib.optim.LearnableOptimizer(model, made, lr=lr).double())


def train(lib, name, transform, steps=4, meta_lr=0.1):
    """The loop of learn2learn's own example; what every step leaves behind."""
    model, metaopt = optimizer_of(lib, name, transform)
    opt = torch.optim.SGD(metaopt.parameters(), lr=meta_lr)
    seen = []
    for step in range(steps):
        metaopt.zero_grad()
        opt.zero_grad()
        loss = support_loss(model, name, step)
        loss.backward()
        seen += [p.grad.clone() for p in metaopt.parameters() if p.grad is not None]
        opt.step()
        metaopt.step()
        seen += [loss.detach(), *(p.detach().clone() for p in model.parameters())]
    seen += [p.detach() for p in metaopt.parameters()]
    return seen


@pytest.mark.parametrize("transform", [k for k in TRANSFORMS if k not in ("none", "dictionary")])
@pytest.mark.parametrize("name", ["mlp", "cnn", "tied", "unused"])
def test_equals_learn2learn(name, transform):
    results = [train(lib, name, transform) for lib in (fastkfo, l2l)]
    for a, b in zip(*results, strict=True):
        assert_close(a, b, floor=1e-3)


def test_a_recurrent_model():
    """An RNN's flat weights are refreshed: the second loss is that of the new parameters."""
    model, metaopt = optimizer_of(fastkfo, "lstm", "kron-psd")
    support_loss(model, "lstm").backward()
    metaopt.step()
    other = build("lstm")
    other.load_state_dict(model.state_dict())
    assert_close(support_loss(model, "lstm"), support_loss(other, "lstm"), tol=1e-14)


@pytest.mark.parametrize("transform", ["dictionary", "none"])
def test_parameters_without_a_transform(transform):
    model, metaopt = optimizer_of(fastkfo, "mlp", transform)  # crashes in learn2learn
    plain = [p for p, t in zip(model.parameters(), metaopt.transforms, strict=True) if t is None]
    for _ in range(2):
        metaopt.zero_grad()
        support_loss(model, "mlp").backward()
        chosen = [i for i, t in enumerate(metaopt.transforms) if t is None]
        want = [p.detach() - LR * p.grad for p in model.parameters()]
        metaopt.step()
        params = list(model.parameters())
        for i in chosen:
            assert_close(params[i], want[i], tol=1e-14)
    assert plain


def test_frozen_parameters_stay():
    model, metaopt = optimizer_of(fastkfo, "frozen", "kron-psd")  # crashes in learn2learn
    before = list(model.parameters())
    for _ in range(2):
        metaopt.zero_grad()
        support_loss(model, "frozen").backward()
        metaopt.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert (new is old) != old.requires_grad
        assert new.requires_grad == old.requires_grad
    assert model(task("frozen")[0]).requires_grad


def test_keys_and_where_the_model_is():
    results = [optimizer_of(lib, "cnn", "kron-psd-bias") for lib in (fastkfo, l2l)]
    ours, theirs = (metaopt for _, metaopt in results)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.info["model"] is results[0][0]
    assert all(p is not q for p in ours.parameters() for q in results[0][0].parameters())


@pytest.mark.parametrize("name", ["mlp", "conv1d", "conv3d", "scalar"])
def test_the_identity_is_sgd(name):
    model = build(name)
    metaopt = LearnableOptimizer(
        model, fastkfo.optim.KroneckerTransform(fastkfo.nn.KroneckerLinear), lr=LR
    )
    other = build(name)
    sgd = torch.optim.SGD(other.parameters(), lr=LR)
    for _ in range(3):
        metaopt.zero_grad()
        sgd.zero_grad()
        support_loss(model, name).backward()
        support_loss(other, name).backward()
        metaopt.step()
        sgd.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(a, b, tol=1e-13)


def test_closure():
    model, metaopt = optimizer_of(fastkfo, "mlp", "kron-psd")
    want = train(fastkfo, "mlp", "kron-psd", steps=1)[0]

    def closure():
        metaopt.zero_grad()
        loss = support_loss(model, "mlp")
        loss.backward()
        return loss

    assert_close(metaopt.step(closure).detach(), want, tol=1e-14)
    assert metaopt.step() is None


def test_zero_grad_makes_new_zeros():
    model, metaopt = optimizer_of(fastkfo, "mlp", "kron-psd")
    support_loss(model, "mlp").backward()
    old = [p.grad for p in model.parameters()]
    metaopt.zero_grad()
    assert all(g.abs().sum() > 0 for g in old)
    assert all(p.grad.abs().sum() == 0 for p in model.parameters())


def test_a_rate_that_is_a_tensor():
    rate = torch.tensor(LR, dtype=torch.float64, requires_grad=True)
    model, metaopt = optimizer_of(fastkfo, "mlp", "kron-psd", lr=rate)
    support_loss(model, "mlp").backward()
    before = [p.detach().clone() for p in model.parameters()]
    metaopt.step()
    delta = [(p.detach() - q) / LR for p, q in zip(model.parameters(), before, strict=True)]
    grads = torch.autograd.grad(
        loss := support_loss(model, "mlp", 1), list(model.parameters()), retain_graph=True
    )
    loss.backward()
    want = sum((g * d).sum() for g, d in zip(grads, delta, strict=True))
    assert_close(rate.grad, want)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, r"model: expected a torch\.nn\.Module, got int"),
        ({"lr": float("nan")}, ValueError, "lr: expected a finite number, got nan"),
        ({"lr": "1"}, TypeError, "lr: expected a number or a tensor, got str"),
        ({"transform": lambda p: 3}, ValueError, "Module or None for parameter 0, got int"),
    ],
    ids=["model", "nan", "str", "transform"],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        LearnableOptimizer(**{"model": build("mlp"), "transform": lambda p: None, **arguments})


@pytest.mark.parametrize("how", ["function", "method"])
def test_compiled_models(how):
    model = build("mlp")
    if how == "method":
        model.compile()
    else:
        model = torch.compile(model)
    with pytest.raises(
        TypeError, match="model: expected a module of plain PyTorch, got a compiled"
    ):
        LearnableOptimizer(model, lambda p: None)


class Bad(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, grad):
        return self.value(grad)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (lambda g: g[:1], ValueError, r"parameter 0.* shape \[7, 4\], got \[1, 4\]"),
        (lambda g: None, TypeError, "parameter 0.* to return a tensor, got NoneType"),
    ],
    ids=["shape", "none"],
)
def test_transforms_that_return_no_update(value, error, message):
    model = build("mlp")
    metaopt = LearnableOptimizer(model, lambda p: Bad(value), lr=LR)
    support_loss(model, "mlp").backward()
    before, grads = snapshot(model), [p.grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        metaopt.step()
    assert snapshot(model)[:2] == before[:2]
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    for module in metaopt.transforms:
        module.value = lambda g: g
    metaopt.step()
    assert snapshot(model)[0] != before[0]


def test_a_copy_trains_alone():
    model, metaopt = optimizer_of(fastkfo, "mlp", "kron-psd")
    other = copy.deepcopy(metaopt)
    saved = [p.clone() for p in model.parameters()]
    support_loss(other.info["model"], "mlp").backward()
    other.step()
    pairs = zip(saved, model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(p.grad is None for p in model.parameters())
