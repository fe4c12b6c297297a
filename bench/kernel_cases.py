"""What `bench.kernels` times: the Kronecker ops, the fused inner loop, cross-entropy.

A case is an op on operands of one workload, once for each derivative. Its work is what the op
must do: the products of a named algorithm that computes each once and has nothing kept from an
earlier pass, and every operand read and every result written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkfo
from bench import floors
from bench.floors import Count
from bench.problem import Functional, Problem
from fastkfo import functional
from fastkfo.inner_loop.known_models import read_model
from fastkfo.inner_loop.known_steps import read_step
from fastkfo.inner_loop.options import rule_of

LR = 0.1
PARTS = ("forward", "backward", "double backward")
EVERY = ("native", "triton", "reference")
BLAS = "BLAS"
WIDTH = 4  # bytes of a float32
LOSSES: dict[Any, str] = {F.cross_entropy: "cross_entropy", F.mse_loss: "mse"}

Call = Callable[[], Sequence[Tensor]]
Items = Sequence[tuple[int, int, int]]  # B, n, m of every parameter, tasks counted in B


@dataclass(frozen=True)
class Case:
    """One op, one set of operands, one derivative.

    Attributes:
        op: its name.
        case: the operands, in words.
        part: one of PARTS, or what else of the op is meant.
        work: what it takes.
        make: the call to be timed, given an implementation, a dtype and a device.
        implementations: whose calls there are, where they are available.
        baseline: the one that ratios are to, or None.
    """

    op: str
    case: str
    part: str
    work: Count
    make: Callable[[str, torch.dtype, str], Call]
    implementations: tuple[str, ...] = EVERY
    baseline: str | None = None


class Draw:
    """Normal numbers, the same in every dtype."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self._generator = torch.Generator(device).manual_seed(0)
        self._dtype, self._device = dtype, device

    def __call__(self, *shape: int) -> Tensor:
        options: Any = {"generator": self._generator, "device": self._device}
        return torch.randn(*shape, dtype=torch.float64, **options).to(self._dtype)

    def like(self, x: Tensor) -> Tensor:
        """Of another tensor's shape and strides."""
        return torch.empty_like(x.detach()).copy_(self(*x.shape))

    def factor(self, n: int) -> Tensor:
        """A matrix that leaves sizes about as they are."""
        return self(n, n) / math.sqrt(n)


def derivative(
    function: Callable[..., Any],
    operands: Sequence[Tensor],
    order: int,
    draw: Draw,
    curved: Sequence[Tensor] | None = None,
) -> Call:
    """A function of tensors, its gradient, or the gradient of that; one pass of it alone.

    Args:
        function: gives a tensor or several.
        operands: its arguments; gradients are of those that require one.
        order: 0, 1 or 2.
        draw: draws cotangents, which lie in memory as what they are of.
        curved: the operands that second derivatives depend on; None: all with a gradient.

    Returns:
        The pass, which can be called again and again.
    """
    if order == 0:
        return lambda: _several(function(*[x.detach() for x in operands]))
    outputs = _several(function(*operands))
    leaves = [x for x in operands if x.requires_grad]
    cotangents = [draw.like(y).requires_grad_(order == 2) for y in outputs]
    if order == 1:
        return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)
    first = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
    tangents = [draw.like(g) for g in first]
    wanted = [*(leaves if curved is None else curved), *cotangents]
    return lambda: torch.autograd.grad(first, wanted, tangents, retain_graph=True)


def _several(found: Any) -> Sequence[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def fused(workload: str, **sizes: Any) -> Case:
    """A whole meta-gradient of KFO in `functional.inner_loop`; the floor is that of the workload's.

    Args:
        workload: of linear layers.
        sizes: of the problem, where they are not the workload's.
    """
    own = Problem.named(workload, "kfo", **sizes)
    # The floor is its longer part's: of the two counts the one with fewer products.
    work = min(floors.count(own).values(), key=lambda count: count.flops)

    def make(implementation: str, dtype: torch.dtype, device: str) -> Call:
        problem = Problem.named(workload, "kfo", **sizes, dtype=dtype, device=device)
        learner: Any = problem.learner(fastkfo)
        model = read_model(learner.module)
        step = read_step(rule_of(learner, {}), model.theta)
        x_s, y_s, x_q, y_q = problem.data
        if model.flat:
            x_s, x_q = x_s.flatten(2), x_q.flatten(2)
        learned = list(learner.parameters())

        def run() -> Sequence[Tensor]:
            out = functional.inner_loop(
                model.layers, model.theta, x_s, y_s, x_q, y_q,
                steps=problem.steps, lr=list(step.alpha), left=step.left, right=step.right,
                psd=step.psd, loss=LOSSES[problem.loss], implementation=implementation,
            )  # fmt: skip
            assert out.loss is not None
            return torch.autograd.grad(out.loss.sum(), learned)

        return run

    case = f"{workload} T {own.tasks} K {own.steps}"
    return Case("inner_loop", case, "meta-gradient", work, make, ("native", "reference"))


def items_of(workload: str, tasks: int, **sizes: Any) -> Items:
    """B, n and m of every parameter of T tasks of a workload: factors are all tasks' own."""
    form = Functional(Problem.named(workload, "kfo", **sizes))
    theta, phi = form.theta(form.state), form.phi(form.state)
    found = []
    for name, p in theta.items():
        n, m = len(phi[name].left), len(phi[name].right)
        found.append((tasks * p.numel() // (n * m), n, m))
    return found


def kron(case: str, items: Items) -> Iterator[Case]:
    """`kron_update` of all parameters in one call, and its derivatives in G, A and C."""
    for order, part in enumerate(PARTS):

        def make(implementation: str, dtype: torch.dtype, device: str, order: int = order) -> Call:
            draw = Draw(dtype, device)
            theta = [draw(*item) for item in items]
            grads = [draw(*item).requires_grad_(order > 0) for item in items]
            left = [draw.factor(n).requires_grad_(order > 0) for _, n, _ in items]
            right = [draw.factor(m).requires_grad_(order > 0) for _, _, m in items]
            count = len(items)

            def run(*x: Tensor) -> list[Tensor]:
                groups = [list(x[k * count : (k + 1) * count]) for k in range(4)]
                return functional.kron_update(*groups, lr=LR, implementation=implementation)

            return derivative(run, [*theta, *grads, *left, *right], order, draw)

        yield Case("kron_update", case, part, kron_work(items, order), make)


def kron_work(items: Items, order: int) -> Count:
    """What `θ − lr A G C` takes, or a derivative of it with all cotangents.

    With products by A and C, n and m to a row: U is one of each. Of its cotangent V, Z = AᵀV,
    Z Cᵀ, GᵀZ, V Cᵀ and (V Cᵀ)Gᵀ, or the mirror image with G C. The second derivative shares G C and
    Z: 5 of the longer and 7 of the shorter side.
    """
    flops = numbers = 0
    for batch, n, m in items:
        both, shorter = n + m, min(n, m)
        rows = [both, 2 * both + shorter, 5 * both + 2 * shorter][order]
        flops += 2 * batch * n * m * rows
        whole, factors = batch * n * m, n * n + m * m
        # θ, G, A, C and U; V, G, A, C and three gradients; the same with three tangents.
        numbers += [3 * whole + factors, 3 * whole + 2 * factors, 5 * whole + 3 * factors][order]
    return Count(flops, WIDTH * numbers)


def large(size: int) -> Case:
    """One square parameter, beside the two products by which BLAS does it."""

    def make(implementation: str, dtype: torch.dtype, device: str) -> Call:
        draw = Draw(dtype, device)
        theta, g = draw(size, size), draw(size, size)
        a, c = draw.factor(size), draw.factor(size)
        if implementation == BLAS:
            return lambda: [torch.addmm(theta, a @ g, c, alpha=-LR)]
        options: Any = {"lr": LR, "implementation": implementation}
        return lambda: functional.kron_update([theta], [g], [a], [c], **options)

    work = kron_work([(1, size, size)], 0)
    names = (*EVERY, BLAS)
    return Case("large factors", f"{size} x {size}", PARTS[0], work, make, names, BLAS)


def gram(case: str, items: Items) -> Iterator[Case]:
    """`LᵀL` of all factors in one call, and its gradient `L (V + Vᵀ)`."""
    sizes = [n for _, *sides in items for n in sides]
    bytes_ = [WIDTH * k * sum(n * n for n in sizes) for k in (2, 3)]
    flops = [sum(n * n * (n + 1) for n in sizes), sum(2 * n**3 for n in sizes)]
    for order in (0, 1):

        def make(implementation: str, dtype: torch.dtype, device: str, order: int = order) -> Call:
            draw = Draw(dtype, device)
            factors = [draw.factor(n).requires_grad_(order > 0) for n in sizes]

            def run(*x: Tensor) -> list[Tensor]:
                return functional.gram(x, implementation=implementation)

            return derivative(run, factors, order, draw)

        yield Case("gram", case, PARTS[order], Count(flops[order], bytes_[order]), make)


def cross_entropy(tasks: int, samples: int, classes: int) -> Iterator[Case]:
    """Softmax cross-entropy of every task."""
    numbers = tasks * samples * classes
    for order, part in enumerate(PARTS):

        def make(implementation: str, dtype: torch.dtype, device: str, order: int = order) -> Call:
            draw = Draw(dtype, device)
            logits = draw(tasks, samples, classes).requires_grad_(order > 0)
            labels = torch.arange(tasks * samples, device=device).view(tasks, samples) % classes

            def run(z: Tensor) -> Tensor:
                return functional.cross_entropy(z, labels, implementation=implementation)

            return derivative(run, [logits], order, draw)

        # Logits; logits and their gradient; these and the cotangent of that.
        work = Count(0, WIDTH * (order + 1) * numbers + 8 * tasks * samples)
        case = f"{tasks}, {samples}, {classes}"
        yield Case("cross_entropy", case, part, work, make, ("native", "reference"))
