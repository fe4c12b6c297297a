"""What learners promise of inner optimizers and rates: nothing is ignored, nothing else changed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.optim import PerStepLR
from fastkfo.optim.inner import Adam, InnerOptimizer
from tests.batches import batch
from tests.inner_optimizer_cases import PATHS, by_batch, by_loop, inner_loop, learner
from tests.models import LR, build
from tests.oracle import learn2learn

MAML, GBML = fastkfo.algorithms.MAML, fastkfo.algorithms.GBML
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


class Own(InnerOptimizer):
    def direction(self, update, buffers, count):
        return update.sign(), ()


class OwnModule(Own, nn.Module):
    pass


class Slotted(Own):
    __slots__ = ("beta",)


def holding(value, kind=Own):
    optimizer = kind()
    optimizer.beta = value
    return optimizer


class OfClass(Own):
    beta = nn.Parameter(torch.ones(()))


LEARNED = {
    "parameter": lambda: holding(nn.Parameter(torch.ones(()))),
    "tensor": lambda: holding(torch.ones((), requires_grad=True)),
    "list": lambda: holding([0.1, {"a": torch.ones((), requires_grad=True)}]),
    "module": lambda: holding(nn.Linear(1, 1)),
    "slot": lambda: holding(torch.ones((), requires_grad=True), Slotted),
    "class": OfClass,
}


@pytest.mark.parametrize("kind", ["maml", "kfo"])
def test_an_optimizer_that_is_a_module_is_no_inner_optimizer(kind):
    expected = r"inner_optimizer: expected one whose .* got OwnModule, a torch.nn.Module"
    with pytest.raises(TypeError, match=expected):
        learner(kind=kind, inner_optimizer=OwnModule())
    ours, (x, y) = learner(kind=kind), (z[0] for z in batch("mlp", 1)[:2])
    ours.inner_optimizer = OwnModule()
    with pytest.raises(TypeError, match=expected):
        inner_loop(ours, 1)
    clone = ours.clone()
    loss = F.cross_entropy(clone(x), y)
    with pytest.raises(TypeError, match=expected):
        clone.adapt(loss)


@pytest.mark.parametrize("make", LEARNED.values(), ids=LEARNED)
def test_an_optimizer_has_nothing_to_learn(make):
    with pytest.raises(TypeError, match=r"inner_optimizer: .* whose 'beta' requires a gradient"):
        learner(inner_optimizer=make())
    learner(inner_optimizer=holding([0.9, torch.ones(()), nn.Identity()]))


@pytest.mark.parametrize("kind", ["maml", "kfo"])
@pytest.mark.parametrize("name", ["collapsed", "larger"])
def test_rates_of_another_model(kind, name):
    """The model is exchanged: rates are never those of other parameters."""
    ours, data = learner(kind=kind, steps=3), batch("mlp", 2)
    loop, clone = inner_loop(ours, 3), ours.clone()
    layers = [*ours.module.children()]
    other = nn.Sequential(*layers[:1], *layers[2:]) if name == "larger" else nn.Linear(4, 3)
    if name == "larger":
        other.append(nn.Linear(3, 3))
    for own in (ours, clone):
        own.module = other.double()
    count = len(list(other.parameters()))
    expected = f"lr: expected a PerStepLR with {count} rates, one per parameter .* got 4"
    calls = [
        lambda: loop(*data),
        lambda: loop.adapt(*data[:2]),
        lambda: inner_loop(ours, 3),
        lambda: ours.clone(tasks=2),
        lambda: by_loop(ours, 3, data),
        lambda: clone.adapt(F.cross_entropy(clone(data[0][0]), data[1][0])),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=expected):
            call()


RATES = {
    "parameter": lambda model: nn.Parameter(torch.full((), LR, dtype=torch.float64)),
    "per step": lambda model: PerStepLR(model, 3),
    "shared": lambda model: PerStepLR(model, 3, shared=True),
}


def adapted(ours, data):
    clone = ours.clone()
    clone.adapt(F.cross_entropy(clone(data[0][0]), data[1][0]))
    return clone


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
@pytest.mark.parametrize("kind", ["maml", "gbml"])
def test_a_detached_clone_leaves_the_learners_rates(kind, rate, keep):
    model, data = build("mlp").double(), batch("mlp", 2)
    lr = rate(model)
    ours = MAML(model, lr) if kind == "maml" else GBML(model, lambda p: None, lr)
    before = ours.state_dict(keep_vars=True)
    clone = adapted(ours, data)
    keys = [*clone.state_dict()]
    fastkfo.utils.detach_module(clone, keep_requires_grad=keep)
    after = ours.state_dict(keep_vars=True)
    assert [*before] == [*after]
    assert all(after[n] is p and p.requires_grad and p.is_leaf for n, p in before.items())
    own = clone.state_dict(keep_vars=True)
    assert [*own] == keys
    assert all(p.requires_grad is keep and p.is_leaf for p in own.values())
    assert not {p.data_ptr() for p in own.values()} & {p.data_ptr() for p in after.values()}
    if keep:  # it goes on by itself
        again = adapted(clone, data)
        loss = F.cross_entropy(again(data[2][0]), data[3][0])
        assert all(g is not None for g in torch.autograd.grad(loss, list(clone.parameters())))
    if kind == "gbml" and isinstance(lr, nn.Parameter):
        assert clone.diff_sgd.lr is clone.lr
    by_loop(ours, 3, data).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


@pytest.mark.parametrize("adapt_transform", [False, True])
def test_a_detached_batched_clone_leads_back_to_nothing(adapt_transform):
    """Neither by its parameters nor by the state, the rates or the transform."""
    model, data = build("mlp").double(), batch("mlp", 3)
    update = fastkfo.optim.KroneckerTransform(fastkfo.nn.KroneckerLinear)
    lr = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    ours = GBML(
        model, update, lr, adapt_transform=adapt_transform, inner_optimizer=Adam(eps=1e-3)
    ).double()
    losses = fastkfo.per_task(F.cross_entropy)
    clone = ours.clone(tasks=3)
    for _ in range(2):
        clone.adapt(losses(clone(data[0]), data[1]))
    fastkfo.utils.detach_module(clone, keep_requires_grad=True)
    for _ in range(2):
        clone.adapt(losses(clone(data[0]), data[1]), allow_unused=True)
    loss = losses(clone(data[2]), data[3]).sum()
    found = torch.autograd.grad(loss, list(ours.parameters()), allow_unused=True)
    assert all(g is None for g in found)
    assert all(p.requires_grad for p in ours.parameters())


def test_a_learner_that_is_detached_is_frozen_itself():
    ours = MAML(build("mlp"), nn.Parameter(torch.ones(())))
    fastkfo.utils.detach_module(ours)
    assert not any(p.requires_grad for p in ours.parameters())


def test_what_learn2learns_detach_module_does_to_a_clone():
    """docs/inner_optimizers.md says so."""
    model, data = build("mlp").double(), batch("mlp", 1)
    ours = MAML(model, RATES["parameter"](model), inner_optimizer=Adam())
    clone = adapted(ours, data)
    learn2learn().detach_module(clone, keep_requires_grad=False)
    assert not ours.lr.requires_grad
    assert all(b.requires_grad for b in clone._inner_state.flat())


@every_path
@pytest.mark.parametrize("shared", [False, True])
def test_everything_that_requires_a_gradient_gets_one(shared, path):
    """A frozen parameter's rates do not, or DistributedDataParallel waits for them."""
    model = build("mlp").double()
    model[0].bias.requires_grad_(False)
    lr, data = PerStepLR(model, 2, shared=shared), batch("mlp", 2)
    ours = MAML(model, lr, allow_nograd=True, inner_optimizer=Adam(eps=1e-2))
    loop = inner_loop(ours, 2, **path)
    loop(*data).loss.sum().backward()
    wanted = {n: p.grad is not None for n, p in loop.named_parameters() if p.requires_grad}
    assert all(wanted.values()), wanted
    assert sum("lr.rates" in n for n in wanted) == (1 if shared else 3)
    frozen = [p for p in lr.parameters() if not p.requires_grad]
    assert len(frozen) == (0 if shared else 1)
    by_batch(ours, 2, data).sum().backward()


class Named(nn.Module):
    """A model with attributes of the names of options."""

    inner_optimizer, clip_grad_norm = "mine", 3

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)


def test_options_hide_none_of_the_models_attributes():
    ours = MAML(Named(), LR)
    for own in (ours, ours.clone()):
        assert (own.inner_optimizer, own.clip_grad_norm, own.clip_grad_value) == ("mine", 3, None)
        own.adapt(F.cross_entropy(own(torch.ones(2, 4)), torch.ones(2, dtype=torch.long)))
    given = MAML(Named(), LR, inner_optimizer=Adam()).clone()
    assert (given.inner_optimizer, given.clip_grad_norm) == (Adam(), 3)
    with pytest.raises(AttributeError, match="nothing"):
        ours.nothing  # noqa: B018


def test_repr():
    plain, given = (MAML(nn.Linear(1, 1), LR, **x) for x in ({}, {"inner_optimizer": Adam()}))
    clipped = GBML(nn.Linear(1, 1), lambda p: None, clip_grad_norm=2.0).clone()
    assert repr(plain).splitlines()[:2] == [
        "MAML(",
        "  (module): Linear(in_features=1, out_features=1, bias=True)",
    ]
    assert "  inner_optimizer=Adam(betas=(0.9, 0.999), eps=1e-08)\n" in repr(given)
    assert "  clip_grad_norm=2.0\n" in repr(clipped)
