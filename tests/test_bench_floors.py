"""Counts against PyTorch's flop counter, and against the algorithms written out. Nothing is timed.

What is counted depends on shapes alone, so most runs are on the meta device and compute nothing.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from bench import ceilings
from bench.floors import (
    Count,
    Parts,
    count,
    dense,
    factored_or_dense,
    floor_seconds,
    layers_of,
    parts_of,
)
from bench.peers.reference_peer import PEER
from bench.problem import Functional, Problem
from bench.products import Entry, Kron, Layer, Loop, Modes, factored, transform
from bench.workloads import METHODS, WORKLOADS
from fastkfo.reference.loop import Factors, adapt
from fastkfo.reference.transforms import Curvature, kronecker, update

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called

SMALL = {"sine-mlp": 6, "anil-head": 8, "omniglot-fc": 16, "omniglot-cnn": 6}
FAMILIES = [name for name in WORKLOADS if name != "miniimagenet-cnn4-5shot"]  # that of one shot
LR = 0.3


def small(workload, method, **sizes):
    return Problem.named(
        workload, method, **{"tasks": 2, "steps": 2, "width": SMALL.get(workload, 4)} | sizes
    )


def counted(run):
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops(), result


def flops_of_reference(problem):
    prepared = PEER.prepare(problem)
    return counted(prepared.seconds)[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("workload", FAMILIES)
def test_unrolled_is_the_flop_counter_and_the_others_are_below(workload, method):
    problem = small(workload, method, tasks=1)
    counts = {name: c.flops for name, c in count(problem).items()}
    assert counts["unrolled"] == flops_of_reference(replace(problem, device="meta"))
    assert 0 < counts["factored"] <= counts["dense"] <= counts["unrolled"]


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("workload", ["sine-mlp", "omniglot-cnn", "anil-cifarfs"])
def test_unrolled_at_other_numbers_of_steps(workload, steps):
    problem = small(workload, "kfo-adapt", steps=steps, device="meta")
    assert count(problem)["unrolled"].flops == flops_of_reference(problem)


@pytest.mark.parametrize(
    ("workload", "method"),
    [("sine-mlp", "kfo-adapt"), ("anil-head", "meta-curvature"), ("omniglot-cnn", "kfo")],
)
def test_a_run_on_the_cpu_takes_as_many_as_one_without_numbers(workload, method):
    problem = small(workload, method, tasks=1)
    assert count(problem)["unrolled"].flops == flops_of_reference(problem)


def test_anil_head_by_hand():
    # 25 + 25 samples of 8 features, 5 classes, one task and one step.
    # P = 2 · 25 · 5 · 8 = 2000. The input is data: 4 P in the step, 2 P for the query: 12000.
    problem = small("anil-head", "maml", tasks=1, steps=1)
    data = 4 * (2 * 25 * 8) + 8 * (2 * 25)  # float32 features, int64 labels
    assert count(problem)["dense"] == Count(12000, data + 2 * 4 * (5 * 8 + 5))
    # The weight's U is 2 · 5 · 8 · (5 + 8) = 1040, the bias's 2 · 5 · 1 · (5 + 1) = 60, and the way
    # back is twice that: 3300. Grams: n² (n + 1) for a triangle, 2 n³ for the way back:
    # 150 + 250 for each n = 5, 576 + 1024 for n = 8, 2 + 2 for n = 1: 2404.
    flops, bytes_ = count(replace(problem, method="kfo"))["dense"]
    assert flops == 12000 + 3300 + 2404
    assert bytes_ == data + 2 * 4 * (45 + 25 + 64 + 25 + 1)
    # Factored, 64 wide (P = 16000): 5 P and 2 P, and with Δ and X kept 3 · 2 · 5² · 25 = 3750 and
    # 2 · 2 · 25 · 64² = 409600, in place of 3 · 2 · 5 · 64 · 69 = 132480 and a P: so not here; with
    # five steps it is 5 · 3750 + 409600 and 5 P in place of 5 · 132480.
    one, five = (count(replace(problem, method="kfo", width=64, steps=k)) for k in (1, 5))
    assert one["factored"] == one["dense"]
    saved = 5 * 132480 - (5 * 3750 + 409600 + 5 * 16000)
    assert five["dense"].flops - five["factored"].flops == saved > 0


def test_flops_and_bytes_are_of_no_device_and_bytes_of_the_dtype():
    problem = small("sine-mlp", "kfo")
    assert count(problem) == count(replace(problem, device="meta"))
    single, double = count(problem)["dense"], count(problem.to(torch.float64))["dense"]
    assert double == Count(single.flops, 2 * single.bytes)


@pytest.mark.parametrize("method", METHODS)
def test_tasks_add_up_but_for_what_they_share(method):
    one, two, three = (
        {n: c.flops for n, c in count(small("sine-mlp", method, tasks=t)).items()}
        for t in (1, 2, 3)
    )
    assert two["unrolled"] == 2 * one["unrolled"]
    # Grams of φ_0, of n = 6 and m = 1, 6 · 1, 6 and 6, 6 · 1, 1 and 6, 1 · 1.
    six, unit = 6 * 6 * 7 + 2 * 6**3, 4
    shared = 6 * six + 6 * unit if "kfo" in method else 0
    for name in ("dense", "factored"):
        assert three[name] - two[name] == two[name] - one[name] == one[name] - shared


@pytest.mark.parametrize("shape", [(5, 3), (4,), (6, 2, 3, 3)], ids=str)
def test_one_transform_takes_what_the_formula_takes(shape):
    n, m = (shape[1], 9) if len(shape) == 4 else (*shape, 1)[:2]
    leaves = [torch.randn(*s, requires_grad=True) for s in (shape, (n, n), (m, m))]
    flops, u = counted(lambda: kronecker(leaves[0], Factors(*leaves[1:]), psd=False))
    t = Kron(leaves[0].numel() // (n * m), n, m)
    assert flops == t.once
    assert flops + counted(lambda: u.sum().backward())[0] == t.step


@pytest.mark.parametrize(("a", "b", "f"), [(4, 3, 9), (2, 6, 4)])
def test_one_curvature_takes_what_the_formula_takes(a, b, f):
    leaves = [torch.randn(s, requires_grad=True) for s in ((a, b, f), (a, a), (b, b), (f, f))]
    forward, u = counted(lambda: update(leaves[0], Curvature(*leaves[1:])))
    assert forward + counted(lambda: u.sum().backward())[0] == Modes(a, b, f).step


class Gram(torch.autograd.Function):
    """LᵀL with one product on the way back."""

    @staticmethod
    def forward(ctx, left):
        ctx.save_for_backward(left)
        return left.T @ left

    @staticmethod
    def backward(ctx, cotangent):
        return ctx.saved_tensors[0] @ (cotangent + cotangent.T)


class Dense:
    """One layer's φ, with its grams. What it is given is G; the cheaper of A G and G C is kept."""

    def __init__(self, left, right):
        self.left, self.right = left, right
        self.a, self.c = Gram.apply(left), Gram.apply(right)
        self.wide = len(right) > len(left)

    def signal(self, delta, x, constant):
        return delta.T @ x

    def update(self, g):
        self.g, self.kept = g, g @ self.c if self.wide else self.a @ g
        return self.a @ self.kept if self.wide else self.kept @ self.c

    def cotangents(self, v):
        """Of A and C, for the cotangent v of the last update."""
        if self.wide:
            return v @ self.kept.T, self.g.T @ (self.a @ v)
        return (v @ self.c) @ self.g.T, self.kept.T @ v

    def moved(self, v):
        a, c = self.cotangents(v)
        left = self.left + LR**2 * self.left @ (a + a.T)
        return type(self)(left, self.right + LR**2 * self.right @ (c + c.T))


class Factored(Dense):
    """The same with G as Δ and X, which is how it is given."""

    def signal(self, delta, x, constant):
        return delta, x, constant

    def update(self, signal):
        self.delta, self.x, e = signal
        self.d, self.e = self.a @ self.delta.T, self.x @ self.c if e is None else e
        return self.d @ self.e

    def cotangents(self, signal):
        delta, x, _ = signal
        a = delta.T @ ((x @ self.e.T) @ self.delta)
        return a, self.x.T @ ((self.d.T @ delta.T) @ x)


def signals(weights, x, y):
    """Inputs of every layer, and the cotangents of their outputs."""
    inputs = [x]
    for w in weights[:-1]:
        inputs.append(torch.tanh(inputs[-1] @ w.T))
    out = inputs[-1] @ weights[-1].T
    deltas = [2 * (out - y) / out.numel()]
    for w, h in zip(weights[:0:-1], inputs[:0:-1], strict=True):
        deltas.insert(0, (deltas[0] @ w) * (1 - h**2))
    return inputs, deltas


def adapted(states, weights, x, y, steps, adapting):
    """The inner loop; autograd's way back is that of the algorithm, product by product."""
    keeps = isinstance(states[0], Factored) and not adapting
    constants = [x @ states[0].c if keeps else None] + [None] * (len(states) - 1)
    for step in range(steps):
        pieces = zip(states, *signals(weights, x, y), constants, strict=True)
        given = [s.signal(delta, h, constant) for s, h, delta, constant in pieces]
        if adapting and step:
            states = [s.moved(v) for s, v in zip(states, given, strict=True)]
        updates = [s.update(g) for s, g in zip(states, given, strict=True)]
        weights = [w - LR * u for w, u in zip(weights, updates, strict=True)]
    return weights


def written_out(kind, model, tasks, factors, steps, adapting):
    states = [kind(*f) for f in factors]
    total = 0.0
    for x, y, queries, targets in tasks:
        h, *weights = queries, *adapted(states, list(model.parameters()), x, y, steps, adapting)
        for w in weights[:-1]:
            h = torch.tanh(h @ w.T)
        total = total + F.mse_loss(h @ weights[-1].T, targets)
    return total


def by_reference(model, tasks, factors, steps, adapting):
    named = {f"{2 * i}.weight": Factors(*f) for i, f in enumerate(factors)}
    options = {"loss": F.mse_loss, "steps": steps, "lr": LR, "adapt_transform": adapting}
    return sum(
        F.mse_loss(functional_call(model, adapt(model, x, y, factors=named, **options), (q,)), t)
        for x, y, q, t in tasks
    )


def problem_of(entry, samples):
    """A perceptron of a wide and a tall layer, its factors, and tasks; what has gradients."""

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    def factor(n):
        return (torch.eye(n) + 0.2 * torch.randn(n, n)).double().requires_grad_()

    layers = [nn.Linear(7, 9, bias=False), nn.Tanh(), nn.Linear(9, 5, bias=False)]
    model = nn.Sequential(*layers).double()
    factors = [(factor(9), factor(7)), (factor(5), factor(9))]
    shapes = [(samples, 7), (samples, 5), (samples + 1, 7), (samples + 1, 5)]
    tasks = [[normal(*shape) for shape in shapes] for _ in range(TASKS)]
    leaves = [*model.parameters(), *(f for pair in factors for f in pair)]
    if entry is Entry.FEATURES:
        leaves += [t[i].requires_grad_() for t in tasks for i in (0, 2)]
    return model, tasks, factors, leaves


TASKS, STEPS = 2, 3


@pytest.mark.parametrize("adapting", [False, True], ids=["fixed", "adapt"])
@pytest.mark.parametrize("entry", [Entry.DATA, Entry.FEATURES], ids=["data", "features"])
@pytest.mark.parametrize("kind", [Dense, Factored])
def test_the_algorithm_written_out_takes_as_many_and_is_right(kind, entry, adapting):
    samples = 2
    model, tasks, factors, leaves = problem_of(entry, samples)
    flops, gradients = counted(
        lambda: torch.autograd.grad(
            written_out(kind, model, tasks, factors, STEPS, adapting), leaves
        )
    )
    expected = torch.autograd.grad(by_reference(model, tasks, factors, STEPS, adapting), leaves)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()
        assert theirs.norm() > 0

    loop = Loop(TASKS, STEPS, samples, samples + 1, adapting)
    layers, _ = layers_of(model, tasks[0][0].detach(), entry)
    krons = [Kron(1, 9, 7), Kron(1, 5, 9)]
    named = dict(zip([layer.weight for layer in layers], krons, strict=True))
    parts = Parts(layers, [], named, loop)
    # The written-out grams are whole: n (n - 1) / 2 elements more, of 2 n flops each.
    times = 1 + (TASKS * (STEPS - 1) if adapting else 0)
    whole = times * sum(n * n * (n - 1) for n in (9, 7, 5, 9))
    formula = dense if kind is Dense else factored_or_dense
    assert flops == formula(parts) + whole
    for layer, kron in zip(layers, krons, strict=True):  # so that all of it was factored
        plain = STEPS * layer.step(samples) + transform(kron, loop)
        assert factored(layer, kron, loop) < plain


def test_factored_is_taken_by_the_layer():
    loop = Loop(tasks=1, steps=1, support=20, query=20, adapt=False)
    long, short = Kron(1, 400, 400, grams=False), Kron(1, 4, 4, grams=False)
    layers = [
        Layer("long", 2 * 400 * 400, 2 * 400 * 400, 1, Entry.LAYER, linear=True),
        Layer("short", 2 * 4 * 4, 2 * 4 * 4, 1, Entry.LAYER, linear=True),
    ]
    parts = Parts(layers, [], {"long": long, "short": short}, loop)
    saved = transform(long, loop) - 3 * 2 * (400 * 400 * 20 * 2)
    assert dense(parts) - factored_or_dense(parts) == saved > 0


def test_layers_are_found_once_and_first_ones_known():
    problem = small("omniglot-cnn", "maml")  # the module holds its convolutions under two names
    layers = parts_of(problem, Functional(problem)).layers
    names = [name for name, p in Functional(problem).module.named_parameters() if p.dim() > 1]
    assert [layer.weight for layer in layers] == names
    assert [layer.entry for layer in layers] == [Entry.DATA] + 4 * [Entry.LAYER]
    # 28 -> 14, 7, 4, 2 with strides of 2; the kernel's adjoint is 4 x 4 where the side was even.
    assert [layer.positions for layer in layers] == [196, 49, 16, 4, 1]
    ratios = [9 * layer.uncut / layer.product for layer in layers[:-1]]
    assert ratios == [16, 16, 9, 16]

    anil = parts_of(small("anil-cifarfs", "kfo"), Functional(small("anil-cifarfs", "kfo")))
    assert [layer.entry for layer in anil.features] == [Entry.DATA] + 3 * [Entry.LAYER]
    assert [layer.entry for layer in anil.layers] == [Entry.FEATURES]


def test_grouped_convolutions_are_refused():
    with pytest.raises(ValueError, match="of one group"):
        layers_of(nn.Conv2d(4, 4, 3, groups=2), torch.randn(1, 4, 5, 5), Entry.DATA)


def test_floor_is_the_longer_of_the_two():
    rates = {"float32": {"gflops": 100.0}, "float64": {"gflops": 50.0}}
    machine = {"gemm": rates, "copy": {"gb_per_s": 10.0}}
    assert floor_seconds(Count(10**9, 10), machine, torch.float32) == pytest.approx(0.01)
    assert floor_seconds(Count(10**9, 10), machine, torch.float64) == pytest.approx(0.02)
    assert floor_seconds(Count(10**9, 10**9), machine, torch.float64) == pytest.approx(0.1)


def test_ceilings_name_their_candidates():
    sizes = ceilings.Sizes(gemm=8, kron=4, images=1, channels=2, side=4, copied=1024)
    record = ceilings.measure("cpu", seconds=0.0, sizes=sizes)
    for dtype, names in (("float32", 3), ("float64", 2)):
        found = record["gemm"][dtype]
        assert len(found["candidates"]) == names
        assert found["gflops"] == max(found["candidates"].values())
        assert found["candidates"][found["best"]] == found["gflops"] > 0
    assert record["copy"]["gb_per_s"] > 0
    assert record["threads"] == torch.get_num_threads()
    problem = small("sine-mlp", "kfo")
    assert floor_seconds(count(problem)["dense"], record, problem.dtype) > 0
