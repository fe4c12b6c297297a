"""How few operations and bytes a problem takes, by named algorithms: the floor under every row.

    dense      the unrolled adjoint, every product computed once
    factored   the same, but a linear layer's gradient stays Δᵀ X where that is cheaper
    unrolled   what autograd does on fastkfo.reference.loop: equal to PyTorch's flop counter

Flops are those of matrix products (`bench.products` says which, and why). Bytes are the compulsory
traffic: tasks read once, every learned tensor read once and its gradient written once. Both are
bounds for a machine whose cache holds all the rest, and for these algorithms: another algorithm
may take fewer flops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.problem import Functional, Problem
from bench.products import (
    Entry,
    Kron,
    Layer,
    Loop,
    Modes,
    Transform,
    factored,
    grams,
    grams_by_autograd,
    transform,
)
from fastkfo.reference.transforms import Curvature, Factors, Phi


class Count(NamedTuple):
    """What one meta-gradient takes.

    Attributes:
        flops: of matrix products.
        bytes: of compulsory traffic.
    """

    flops: int
    bytes: int


@dataclass(frozen=True)
class Parts:
    """A problem as its products.

    Attributes:
        layers: of the adapted module.
        features: of the feature extractor.
        transforms: of the adapted module's parameters, by name; without elementwise ones.
        loop: the sizes.
    """

    layers: list[Layer]
    features: list[Layer]
    transforms: dict[str, Transform]
    loop: Loop


def count(problem: Problem) -> dict[str, Count]:
    """Counts a problem by each algorithm.

    Args:
        problem: the problem; nothing of its size is computed but one forward pass of one task.

    Returns:
        Flops and bytes by the algorithm's name.
    """
    # The numbers do not depend on the device, nor (but for the width of an item) on the dtype.
    form = Functional(replace(problem, tasks=1, device="cpu"))
    parts = parts_of(problem, form)
    bytes_ = _bytes(problem, form)
    return {name: Count(flops(parts), bytes_) for name, flops in ALGORITHMS.items()}


def floor_seconds(count: Count, ceilings: Mapping[str, Any], dtype: torch.dtype) -> float:
    """The least time that a machine with these ceilings takes.

    Args:
        count: what it takes.
        ceilings: of `bench.ceilings.measure`.
        dtype: float32 or float64.

    Returns:
        Seconds: the products at the rate of the fastest large one, or the traffic at that of a
        large copy, whichever is longer.
    """
    rate = ceilings["gemm"][str(dtype).removeprefix("torch.")]["gflops"]
    return max(count.flops / (1e9 * rate), count.bytes / (1e9 * ceilings["copy"]["gb_per_s"]))


def dense(parts: Parts) -> int:
    """The unrolled adjoint, every product computed once."""
    return _whole(parts, _dense_layer, grams)


def factored_or_dense(parts: Parts) -> int:
    """Dense, but for the linear layers whose gradient is cheaper to keep as Δᵀ X."""
    return _whole(parts, _cheaper_layer, grams)


def unrolled(parts: Parts) -> int:
    """What autograd does on the reference's loop."""
    return _whole(parts, _layer_by_autograd, grams_by_autograd)


ALGORITHMS = {"dense": dense, "factored": factored_or_dense, "unrolled": unrolled}


def parts_of(problem: Problem, form: Functional) -> Parts:
    """Reads a problem's products off its modules and its transforms.

    Args:
        problem: the sizes.
        form: the same problem with one task, on the CPU.
    """
    x_s, _, x_q, _ = replace(problem, tasks=1, device="cpu").data
    entry, x = Entry.DATA, x_s[0]
    features: list[Layer] = []
    if form.features is not None:
        features, x = layers_of(form.features, torch.cat([x, x_q[0]]), Entry.DATA)
        entry = Entry.FEATURES
    layers, _ = layers_of(form.module, x.detach(), entry)
    shapes = {name: tuple(p.shape) for name, p in form.module.named_parameters()}
    known = {n: transform_of(shapes[n], phi) for n, phi in form.phi(form.state).items()}
    return Parts(
        layers,
        features,
        {name: t for name, t in known.items() if t is not None},
        Loop(problem.tasks, problem.steps, len(x_s[0]), len(x_q[0]), problem.adapt_transform),
    )


def transform_of(shape: tuple[int, ...], phi: Phi) -> Transform | None:
    """One parameter's transform; None for an elementwise one.

    Args:
        shape: the parameter's.
        phi: its φ.
    """
    if isinstance(phi, Factors):
        n, m = len(phi.left), len(phi.right)
        return Kron(torch.Size(shape).numel() // (n * m), n, m)
    if isinstance(phi, Curvature) and phi.second is not None:
        a, b = len(phi.first), len(phi.second)
        return Kron(1, a, b, grams=False) if phi.kernel is None else Modes(a, b, len(phi.kernel))
    return None


def layers_of(module: nn.Module, x: Tensor, first: Entry) -> tuple[list[Layer], Tensor]:
    """The layers that a forward pass meets.

    Args:
        module: linear and convolutional layers, and what has no products.
        x: an input that requires no gradient.
        first: what x is.

    Returns:
        The layers, in their order, and the output.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    found: list[Layer] = []

    def see(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        entry = Entry.LAYER if inputs[0].requires_grad else first
        found.append(_layer(names[id(layer.weight)], layer, inputs[0], output, entry))

    with _hooked(module, see):
        output = module(x)
    return found, output


def _layer(name: str, layer: Any, x: Tensor, y: Tensor, entry: Entry) -> Layer:
    positions = y[0].numel() // len(layer.weight)
    product = 2 * positions * layer.weight.numel()
    if isinstance(layer, nn.Linear):
        return Layer(name, product, product, positions, entry, linear=True)
    kernel = layer.weight.shape[2:].numel()
    return Layer(name, product, product // kernel * _uncut(layer, x, y), positions, entry, False)


def _uncut(layer: Any, x: Tensor, y: Tensor) -> int:
    """Elements of the kernel that a convolution of x with y's cotangent has."""
    axes = zip(x.shape[2:], y.shape[2:], layer.stride, layer.dilation, layer.padding, strict=True)
    return math.prod(
        (before + 2 * padding - stride * (after - 1) - 1) // dilation + 1
        for before, after, stride, dilation, padding in axes
    )


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    if any(getattr(layer, "groups", 1) != 1 for layer in layers):
        raise ValueError("module: expected convolutions of one group")
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bytes(problem: Problem, form: Functional) -> int:
    tasks = replace(problem, tasks=1, device="cpu").data
    read = sum(t.numel() * t.element_size() for t in tasks) * problem.tasks
    return read + 2 * sum(p.numel() * p.element_size() for p in form.state.values())


def _whole(
    parts: Parts,
    of_layer: Callable[[Layer, Transform | None, Loop], int],
    of_grams: Callable[[Transform | None, Loop], int],
) -> int:
    """The meta-batch, given one task's inner steps of one layer (or vector) and its transform."""
    loop = parts.loop
    weights = {layer.weight for layer in parts.layers}
    per_task = sum(layer.query(loop.support + loop.query) for layer in parts.features)
    for layer in parts.layers:
        per_task += layer.query(loop.query)
        per_task += of_layer(layer, parts.transforms.get(layer.weight), loop)
    for name, t in parts.transforms.items():
        if name not in weights:
            per_task += transform(t, loop)
    return loop.tasks * per_task + sum(of_grams(t, loop) for t in parts.transforms.values())


def _dense_layer(layer: Layer, t: Transform | None, loop: Loop) -> int:
    return loop.steps * layer.step(loop.support) + transform(t, loop)


def _cheaper_layer(layer: Layer, t: Transform | None, loop: Loop) -> int:
    plain = _dense_layer(layer, t, loop)
    if layer.linear and isinstance(t, Kron):
        return min(plain, factored(layer, t, loop))
    return plain


def _layer_by_autograd(layer: Layer, t: Transform | None, loop: Loop) -> int:
    by_autograd = transform(t, loop, by_autograd=True)
    return loop.steps * layer.step_by_autograd(loop.support) + by_autograd
