"""Learners with inner optimizers, and a loop written from the formulas to compare them with.

The loop keeps every update of a task and sums the optimizers' moments over them, where the code
carries them from step to step.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.func import functional_call

import fastkfo
from fastkfo.optim.inner import SGD, Adam, RMSProp
from tests.models import LR, TRANSFORMS, PlainKron, assert_close, build, perturb

OPTIMIZERS = {
    "momentum": SGD(momentum=0.9),
    "nesterov": SGD(momentum=0.8, nesterov=True),
    "dampening": SGD(momentum=0.9, dampening=0.3),
    "adam": Adam(eps=1e-3),
    "rmsprop": RMSProp(alpha=0.9, eps=1e-2),
    "rmsprop-momentum": RMSProp(alpha=0.9, eps=1e-2, momentum=0.5),
}
CLIPS = {"norm": {"clip_grad_norm": 0.5}, "value": {"clip_grad_value": 0.05}, "none": {}}
PATHS = {
    "full": {"backend": "batched"},
    "checkpoint": {"memory": "checkpoint"},
    "adjoint": {"memory": "adjoint"},
    "chunks": {"chunk_size": 2, "memory": "adjoint"},
    "each": {"backend": "loop"},
    "each-adjoint": {"backend": "loop", "memory": "adjoint"},
}


def learner(name="mlp", kind="kfo", steps=None, shared=False, **options):
    """A MAML or GBML on the model of that name; `steps` makes its rates a PerStepLR."""
    model = build(name)
    lr = LR if steps is None else rates(model, steps, shared)
    if kind == "maml":
        made = fastkfo.algorithms.MAML(model, lr=lr, **options)
    else:
        transform = TRANSFORMS["kron-psd"](fastkfo, model)
        made = fastkfo.algorithms.GBML(model, transform, lr=lr, **options)
    perturb(made.double().module)
    if kind != "maml":
        perturb(made.compute_update)
    return made


def rates(model, steps, shared=False):
    """Rates that all differ."""
    lr = fastkfo.optim.PerStepLR(model, steps=steps, init=LR, shared=shared)
    with torch.no_grad():
        for i, p in enumerate(lr.rates):
            p.add_(0.01 * torch.arange(steps) - 0.003 * i)
    return lr


def inner_loop(ours, steps, **path):
    return fastkfo.InnerLoop(ours, F.cross_entropy, steps, **path)


class Found(NamedTuple):
    losses: torch.Tensor  # [T]
    grads: dict  # of the meta-loss, by name


def found(ours, losses):
    """Differentiate the sum of the losses in everything that is learned."""
    named = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(losses.sum(), list(named.values()), allow_unused=True)
    return Found(losses.detach(), dict(zip(named, grads, strict=True)))


def agree(got, want, tol=1e-10):
    """Equal in norm; a bias before a batch norm has a gradient of rounding alone."""
    assert_close(got.losses, want.losses, tol=tol)
    total = sum(g.square().sum() for g in want.grads.values() if g is not None).sqrt().item()
    assert total > 0
    assert got.grads.keys() == want.grads.keys()
    for name, g in got.grads.items():
        assert_close(g, want.grads[name], floor=1e-4 * total, tol=tol, what=name)


def by_loop(ours, steps, data):
    """learn2learn's loop over clones."""
    losses = []
    for x_s, y_s, x_q, y_q in zip(*data, strict=True):
        clone = ours.clone()
        for _ in range(steps):
            clone.adapt(F.cross_entropy(clone(x_s), y_s))
        losses.append(F.cross_entropy(clone(x_q), y_q))
    return torch.stack(losses)


def by_batch(ours, steps, data):
    """The batched learner."""
    loss, (x_s, y_s, x_q, y_q) = fastkfo.per_task(F.cross_entropy), data
    clone = ours.clone(tasks=len(x_s))
    for _ in range(steps):
        clone.adapt(loss(clone(x_s), y_s))
    return loss(clone(x_q), y_q)


def by_formula(ours, steps, data):
    """Written from the formulas alone."""
    names = [n for n, _ in ours.module.named_parameters()]
    update = [_kronecker(ours, i) for i in range(len(names))]

    def loss(theta, x, y):
        own = dict(zip(names, theta, strict=True))
        return F.cross_entropy(functional_call(ours.module, own, x), y)

    losses = []
    for x_s, y_s, x_q, y_q in zip(*data, strict=True):
        theta = [p.clone() for p in ours.module.parameters()]
        history = [[] for _ in theta]
        for k in range(steps):
            g = torch.autograd.grad(loss(theta, x_s, y_s), theta, create_graph=True)
            for seen, transform, x in zip(history, update, _clipped(ours, g), strict=True):
                seen.append(transform(x))
            theta = [
                p - _rate(ours.lr, k, i) * direction(ours.inner_optimizer, history[i])
                for i, p in enumerate(theta)
            ]
        losses.append(loss(theta, x_q, y_q))
    return torch.stack(losses)


def _kronecker(ours, i):
    if not hasattr(ours, "compute_update"):
        return lambda g: g
    plain, linear = PlainKron.__new__(PlainKron), ours.compute_update.transforms()[i].transform
    vars(plain).update(left=linear.left, right=linear.right, bias=linear.bias, psd=linear.psd)
    return plain.forward


def _rate(lr, k, i):
    return lr if isinstance(lr, float) else lr.rates[0 if lr.shared else i][k]


def _clipped(ours, grads):
    if ours.clip_grad_value is not None:
        most = torch.tensor(ours.clip_grad_value, dtype=torch.float64)
        return [torch.maximum(torch.minimum(g, most), -most) for g in grads]
    if ours.clip_grad_norm is not None:
        norm = torch.cat([g.flatten() for g in grads]).norm() + 1e-6
        most = ours.clip_grad_norm
        return [g * most / norm for g in grads] if norm > most else grads
    return grads


def direction(optimizer, u):
    """What an optimizer makes of all updates so far."""
    n = len(u)
    if optimizer is None:
        return u[-1]
    if isinstance(optimizer, Adam):
        (b1, b2), eps = optimizer.betas, optimizer.eps
        m = sum((1 - b1) * b1 ** (n - 1 - i) * u[i] for i in range(n)) / (1 - b1**n)
        v = sum((1 - b2) * b2 ** (n - 1 - i) * u[i] ** 2 for i in range(n)) / (1 - b2**n)
        return m / (v**0.5 + eps)
    if isinstance(optimizer, RMSProp):
        a, mu = optimizer.alpha, optimizer.momentum

        def scaled(k):
            v = sum((1 - a) * a ** (k - i) * u[i] ** 2 for i in range(k + 1))
            return u[k] / (v**0.5 + optimizer.eps)

        return sum(mu ** (n - 1 - k) * scaled(k) for k in range(n) if mu or k == n - 1)
    mu, damped = optimizer.momentum, 1 - optimizer.dampening
    b = sum(mu ** (n - 1 - i) * u[i] * (damped if i else 1.0) for i in range(n))
    return u[-1] + mu * b if optimizer.nesterov else b
