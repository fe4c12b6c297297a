"""Clipping and optimizers in half precision, on complex numbers, on infinities; bad directions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.optim.inner import SGD, Adam, InnerOptimizer, RMSProp
from fastkfo.optim.inner.clipping import clip_by_norm
from tests.batches import batch
from tests.inner_optimizer_cases import PATHS, agree, by_loop, found, inner_loop, learner
from tests.models import LR, assert_close

MAML, GBML = fastkfo.algorithms.MAML, fastkfo.algorithms.GBML
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0], ids=["tiny", "one", "large"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_in_half_precision_is_pytorchs(dtype, size):
    """Squares of 300 overflow float16, those of 1e-4 vanish in it."""
    torch.manual_seed(0)
    grads = [(size * torch.randn(3, 5)).to(dtype), (size * torch.randn(7)).to(dtype)]
    params = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    most = 0.25 * size
    nn.utils.clip_grad_norm_(params, most)
    rows = clip_by_norm([torch.stack([g, 0 * g]) for g in grads], most, 2)
    for p, ours, row in zip(params, clip_by_norm(grads, most, None), rows, strict=True):
        assert p.grad.abs().sum() > 0
        for x in (ours, row[0]):
            assert x.dtype == dtype
            torch.testing.assert_close(x, p.grad, rtol=4 * torch.finfo(dtype).eps, atol=0)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.z = nn.Parameter(torch.tensor([3 + 4j, 1j], dtype=torch.complex64))


ASKED = [
    ("inner_optimizer", Adam()),
    ("inner_optimizer", RMSProp()),
    ("clip_grad_norm", 1.0),
    ("clip_grad_value", 1.0),
]


@pytest.mark.parametrize(("option", "value"), ASKED)
def test_what_is_for_real_numbers_refuses_complex_ones(option, value):
    expected = f"{option}: expected None with parameter 1 in torch.complex64"
    for make in (MAML, lambda model, lr, **x: GBML(model, lambda p: None, lr, **x)):
        with pytest.raises(TypeError, match=expected):
            make(Complex(), LR, **{option: value})
        clone = make(Complex(), LR).clone()
        clone.adapt(clone.module.z.abs().square().sum() + clone.module.a.sum())
        assert_close(clone.module.z, Complex().z * (1 - 2 * LR), tol=1e-6)
        setattr(clone, option, value)
        loss = clone.module.z.abs().square().sum() + clone.module.a.sum()
        with pytest.raises(TypeError, match=expected):
            clone.adapt(loss)


WRONG = {
    "no buffers": (lambda u: u, TypeError, "a direction and a tuple of buffers, got Tensor"),
    "no tuple": (lambda u: (u, u), TypeError, "a tuple of tensors second, got Tensor"),
    "a number": (lambda u: (u, (0.1,)), TypeError, "second, got a tuple with float"),
    "nothing": (lambda u: (None, ()), TypeError, "in torch.float64 first, got NoneType"),
    "dtype": (lambda u: (u.float(), ()), TypeError, "torch.float64 first, got torch.float32"),
    "shape": (lambda u: (u.sum(), ()), ValueError, r"of shape \[.*\] first, got \[\]"),
    "three": (lambda u: (u, (), ()), TypeError, "a direction and a tuple of buffers, got tuple"),
}


class Wrong(InnerOptimizer):
    def __init__(self, make):
        self.make = make

    def direction(self, update, buffers, count):
        return self.make(update)


@pytest.mark.parametrize("case", WRONG)
def test_what_direction_returns_is_checked(case):
    make, error, message = WRONG[case]
    ours, data = learner(inner_optimizer=Wrong(make)), batch("mlp", 2)
    runs = [lambda: by_loop(ours, 1, data)]
    runs += [lambda p=path: inner_loop(ours, 1, **p)(*data) for path in PATHS.values()]
    for run in runs:
        with pytest.raises(error, match=rf"Wrong\.direction: expected .*{message}"):
            run()


@pytest.mark.parametrize("clip", [{"clip_grad_value": 0.1}, {"clip_grad_norm": 0.1}])
@every_path
def test_an_infinite_gradient_is_not_clipped_to_a_finite_one(path, clip):
    """A task whose support loss overflows contributes nothing, as without clipping."""
    model = nn.Linear(4, 3).double()
    ours = MAML(model, nn.Parameter(torch.tensor(LR, dtype=torch.float64)), **clip)
    torch.manual_seed(0)
    x_s, y_s, x_q, y_q = (torch.randn(3, 5, n, dtype=torch.float64) for n in (4, 3, 4, 3))
    kept = torch.tensor([0, 2])

    def run(*data):
        return fastkfo.InnerLoop(ours, F.mse_loss, 2, **path)(*data)

    want = found(ours, run(x_s[kept], y_s[kept], x_q[kept], y_q[kept]).loss)
    x_s[1] = 1e200
    out = run(x_s, y_s, x_q, y_q)
    assert out.finite.tolist() == [True, False, True]
    assert out.loss[1].isnan()
    got = found(ours, out.loss)
    agree(got._replace(losses=got.losses[kept]), want)


def test_momentum_of_complex_parameters_is_pytorchs():
    ours, theirs = MAML(Complex(), LR, inner_optimizer=SGD(momentum=0.9)), Complex()
    clone, tasks = ours.clone(), ours.clone(tasks=2)
    step = torch.optim.SGD(theirs.parameters(), lr=LR, momentum=0.9)
    for _ in range(3):
        step.zero_grad()
        losses = [m.z.abs().square().sum() + m.a.sum() for m in (theirs, clone.module)]
        losses[0].backward()
        step.step()
        clone.adapt(losses[1])
        tasks.adapt(tasks.module.z.abs().square().sum(1) + tasks.module.a.sum(1))
    for z in (clone.module.z, *tasks.module.z):
        assert_close(z.detach(), theirs.z.detach(), tol=1e-6)
