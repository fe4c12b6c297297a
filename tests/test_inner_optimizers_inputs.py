"""Bad input to inner optimizers, clipping and rates per step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.optim import PerStepLR
from fastkfo.optim.inner import SGD, Adam, RMSProp
from tests.batches import batch
from tests.inner_optimizer_cases import inner_loop, learner
from tests.models import build, snapshot

MAML, GBML = fastkfo.algorithms.MAML, fastkfo.algorithms.GBML


def test_a_failed_call_leaves_all_as_it_was():
    ours, (x, y) = learner(steps=1, inner_optimizer=Adam()), (z[0] for z in batch("mlp", 1)[:2])
    clone = ours.clone()
    clone.adapt(F.cross_entropy(clone(x), y))
    before, state = snapshot(clone), clone._inner_state
    loss = F.cross_entropy(clone(x), y)
    with pytest.raises(ValueError, match=r"lr: expected at most 1 inner steps, .* got step 2"):
        clone.adapt(loss)
    assert snapshot(clone)[:2] == before[:2]
    assert clone._inner_state is state
    loss.backward()  # its graph is there
    tasks = ours.clone(tasks=1)
    losses = fastkfo.per_task(F.cross_entropy)(tasks(x[None]), y[None])
    tasks.adapt(losses)
    with pytest.raises(ValueError, match="got step 2"):
        tasks.adapt(fastkfo.per_task(F.cross_entropy)(tasks(x[None]), y[None]))


def test_steps_that_rates_are_not_for():
    ours, data = learner(steps=3), batch("mlp", 2)
    for steps in (2, 4):
        with pytest.raises(ValueError, match=f"steps: expected 3, as lr has a rate .* got {steps}"):
            inner_loop(ours, steps)
    loop = inner_loop(ours, 3)
    with pytest.raises(ValueError, match=r"steps: expected at most 3, .* got 4"):
        loop(*data, steps=4)
    with pytest.raises(ValueError, match=r"steps: expected at most 3, .* got 4"):
        loop.adapt(*data[:2], steps=4)
    assert loop(*data, steps=2).support_loss.shape == (2, 2)


BAD = [
    (lambda: SGD(momentum=-0.1), ValueError, "momentum: expected at least 0, got -0.1"),
    (lambda: SGD(momentum="0.9"), TypeError, "momentum: expected a number, got str"),
    (lambda: SGD(nesterov=True), ValueError, "nesterov: expected False without momentum"),
    (lambda: SGD(0.9, True, 0.1), ValueError, "nesterov: expected False without momentum or with"),
    (lambda: SGD(0.9, nesterov=1), TypeError, "nesterov: expected a bool, got int"),
    (lambda: SGD(0.9, dampening=float("inf")), ValueError, "dampening: expected a finite number"),
    (lambda: Adam(betas=(0.9, 1.0)), ValueError, r"betas\[1\]: expected a number in \[0, 1\), got"),
    (lambda: Adam(betas=(-0.1, 0.9)), ValueError, r"betas\[0\]: expected a number in \[0, 1\)"),
    (lambda: Adam(betas=0.9), TypeError, "betas: expected two numbers, got 0.9"),
    (lambda: Adam(eps=-1), ValueError, "eps: expected at least 0, got -1"),
    (lambda: RMSProp(alpha=1), ValueError, r"alpha: expected a number in \[0, 1\), got 1"),
    (lambda: RMSProp(momentum=-1), ValueError, "momentum: expected at least 0, got -1"),
    (lambda: learner(inner_optimizer=Adam), TypeError, "inner_optimizer: .* got the class Adam"),
    (
        lambda: learner(inner_optimizer=torch.optim.SGD([torch.ones(1)], 0.1)),
        TypeError,
        "inner_optimizer: expected None or .* got torch.optim.SGD, an outer optimizer",
    ),
    (lambda: learner(inner_optimizer="adam"), TypeError, "inner_optimizer: .* got str"),
    (lambda: learner(clip_grad_norm=0), ValueError, "clip_grad_norm: expected a positive number"),
    (lambda: learner(clip_grad_value=-1.0), ValueError, "clip_grad_value: expected a positive"),
    (lambda: learner(clip_grad_norm=torch.ones(())), TypeError, "clip_grad_norm: expected a num"),
    (lambda: learner(clip_grad_value="1"), TypeError, "clip_grad_value: expected a number, got"),
    (
        lambda: learner(clip_grad_norm=1, clip_grad_value=1),
        ValueError,
        "clip_grad_value: expected None with clip_grad_norm=1, got 1",
    ),
    (
        lambda: learner(steps=3, adapt_transform=True),
        ValueError,
        "adapt_transform: expected False with a PerStepLR of one rate per parameter",
    ),
    (lambda: learner(steps=3).clone(adapt_transform=True), ValueError, "adapt_transform: expected"),
    (
        lambda: inner_loop(learner(steps=3), 3, adapt_transform=True),
        ValueError,
        "adapt_transform: expected False",
    ),
    (
        lambda: MAML(build("mlp"), lr=PerStepLR(build("cnn"), 3)),
        ValueError,
        "lr: expected a PerStepLR with 4 rates, one per parameter of the model, got 10",
    ),
    (
        lambda: MAML(build("mlp"), lr=[0.1]),
        TypeError,
        "lr: expected a number, a tensor or a PerStepLR, got list",
    ),
    (lambda: PerStepLR(build("mlp"), 0), ValueError, "steps: expected at least 1, got 0"),
    (lambda: PerStepLR(build("mlp"), 2.0), TypeError, "steps: expected an int, got float"),
    (lambda: PerStepLR(build("mlp"), 2, init="1"), TypeError, "init: expected a number, got str"),
    (lambda: PerStepLR(build("mlp"), 2, shared=1), TypeError, "shared: expected a bool, got int"),
    (lambda: PerStepLR(3, 2), TypeError, "model: expected a torch.nn.Module, got int"),
    (lambda: PerStepLR(nn.ReLU(), 2), ValueError, "model: expected one with parameters, got none"),
    (
        lambda: GBML(build("mlp"), None, compute_update=nn.Identity(), clip_grad_norm=1),
        ValueError,
        "clip_grad_norm: expected None with a compute_update that is a Identity",
    ),
    (
        lambda: inner_loop(learner(inner_optimizer=Adam()), 3, backend="fused"),
        ValueError,
        "inner_optimizer is Adam",
    ),
    (
        lambda: inner_loop(learner(clip_grad_norm=1), 3, backend="fused"),
        ValueError,
        "gradients are clipped",
    ),
    (
        lambda: inner_loop(learner(steps=3), 3, backend="fused"),
        ValueError,
        "lr has a rate for every step",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
