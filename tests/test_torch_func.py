"""torch.func's grad and vmap over whole learners, and rates and scales of odd shapes."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

import fastkfo as l2l


def meta_loss(learner, values, x, y, adapt):
    """The query loss of one task as a function of the learner's parameters."""

    class Task(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.learner = learner

        def forward(self, x, y):
            clone = self.learner.clone(adapt_transform=adapt)
            for _ in range(2):
                clone.adapt(F.mse_loss(clone(x), y))
            return F.mse_loss(clone(x.flip(0)), y)

    named = {f"learner.{name}": value for name, value in values.items()}
    return functional_call(Task(), named, (x, y))


@pytest.mark.parametrize("adapt", [False, True], ids=["fixed", "adapt"])
def test_grad_and_vmap_over_a_learner(adapt):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)
    learner = l2l.algorithms.GBML(model.double(), transform, lr=0.1)
    for p in learner.parameters():
        p.data += 0.1 * torch.randn_like(p)
    values = dict(learner.named_parameters())
    x, y = torch.randn(3, 5, 3).double(), torch.randn(3, 5, 2).double()

    expected = []
    for t in range(3):
        clone = learner.clone(adapt_transform=adapt)
        for _ in range(2):
            clone.adapt(F.mse_loss(clone(x[t]), y[t]))
        loss = F.mse_loss(clone(x[t].flip(0)), y[t])
        expected.append(torch.autograd.grad(loss, list(values.values())))

    one = grad(lambda v: meta_loss(learner, v, x[0], y[0], adapt))(values)
    torch.testing.assert_close(list(one.values()), list(expected[0]), rtol=1e-10, atol=1e-12)
    mapped = vmap(grad(lambda v, x, y: meta_loss(learner, v, x, y, adapt)), (None, 0, 0))
    for t, rows in enumerate(zip(*mapped(values, x, y).values(), strict=True)):
        torch.testing.assert_close(list(rows), list(expected[t]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_rate_of_one_number_adds_no_axes(shape):
    model = torch.nn.Linear(2, 3)
    model.extra = torch.nn.Parameter(torch.tensor(2.0))
    maml = l2l.algorithms.MAML(model, lr=torch.full(shape, 0.1))
    clone = maml.clone()
    clone.adapt(clone(torch.ones(4, 2)).sum() * clone.module.extra)
    new, old = list(clone.module.parameters()), list(model.parameters())
    assert [p.shape for p in new] == [p.shape for p in old]


@pytest.mark.parametrize("scale", [l2l.nn.Scale(), l2l.nn.Scale((1,))], ids=["none", "one"])
def test_a_scale_of_one_number_adds_no_axes(scale):
    param = torch.tensor(2.0, requires_grad=True)
    update = l2l.optim.ParameterUpdate([param], lambda p: scale)
    (u,) = update(param**2, [param])
    assert u.shape == param.shape
    torch.testing.assert_close(u, torch.tensor(4.0))


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_grams_once_per_clone(implementation, monkeypatch):
    from fastkfo.kernels import selector
    from fastkfo.optim import clone_cache
    from tests.cases import HAS_NATIVE

    if implementation == "native" and not HAS_NATIVE:
        pytest.skip("needs the native library")
    monkeypatch.setenv("FASTKFO_IMPLEMENTATION", implementation)
    selector.reset()
    calls = []
    run = clone_cache.gram_unchecked
    monkeypatch.setattr(clone_cache, "gram_unchecked", lambda f: calls.append(1) or run(f))
    transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)
    clone = l2l.algorithms.GBML(torch.nn.Linear(3, 2), transform, lr=0.1).clone()
    for _ in range(3):
        clone.adapt(clone(torch.ones(4, 3)).square().mean())
    selector.reset()
    assert len(calls) == 1
