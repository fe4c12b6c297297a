"""The same inner loop twice, as it is and recorded, by a stand-in for CUDA graphs."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.inner_loop import recorder
from tests.graphs_on_cpu import Graph
from tests.models import assert_close

CALLS = recorder.EAGER_CALLS + 1


def on_cpu(monkeypatch):
    """Recordings of what runs on the CPU."""
    monkeypatch.setattr(recorder, "DEVICE", "cpu")
    Graph.made = 0


def recorded(loop):
    loop.recorder = recorder.Recorder(Graph)
    Graph.buffers = list(loop.buffers())
    return loop


def batch(seed, tasks=3, size=(8,), needs=False):
    g = torch.Generator().manual_seed(seed)
    x_s, x_q = (torch.randn(tasks, 10, *size, generator=g).double() for _ in range(2))
    y_s, y_q = (torch.randint(5, (tasks, 10), generator=g) for _ in range(2))
    return x_s.requires_grad_(needs), y_s, x_q, y_q


def learner(name="mlp", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))
    if name == "norm":
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
        )
    update = fastkfo.optim.KroneckerTransform(fastkfo.nn.KroneckerLinear)
    return fastkfo.algorithms.GBML(model.double(), update, lr=0.1, **options).double()


def pair(**options):
    """The same inner loop twice: as it is, and recorded; `own` are options of its learner."""
    name = options.pop("name", "mlp")
    plain = learner(name, allow_nograd=True, **options.pop("own", {}))
    other = copy.deepcopy(plain)
    given = {"backend": "batched", **options}
    return (
        fastkfo.InnerLoop(plain, F.cross_entropy, 2, **(given | {"capture": False})),
        recorded(fastkfo.InnerLoop(other, F.cross_entropy, 2, **given)),
    )


def gradients(loop, data, weight=1.0, **options):
    loop.zero_grad()
    out = loop(*data, **options)
    if loop.capture is not False and Graph.made:
        assert loop.recorder.why_not is None
    (weight * out.loss).sum().backward()
    grads = [p.grad.clone() for p in loop.parameters()]
    if data[0].requires_grad:
        grads.append(data[0].grad.clone())
        data[0].grad = None
    return out, grads


def same(a, b):
    flat = [[out.loss, out.predictions, out.support_loss, *grads] for out, grads in (a, b)]
    for x, y in zip(*flat, strict=True):
        assert_close(x.detach(), y.detach(), tol=1e-12)
    assert torch.equal(a[0].finite, b[0].finite)


def both(loops, calls, function):
    """What a function of an inner loop gives, after as many calls, for both."""
    for loop in loops:
        for k in range(calls):
            gradients(loop, batch(k))
    assert loops[1].recorder.why_not is None
    for a, b in zip(*[function(loop) for loop in loops], strict=True):
        assert_close(b.detach(), a.detach(), tol=1e-10)
