"""Flops of the matrix products of a meta-gradient, a multiplication and an addition being two.

The unit is P, one product of a layer `Y = X Wᵀ` over a task's rows: `2 · rows · n_in · n_out`. A
convolution is that product over its output's positions, its padding counted as data, which is the
convention of PyTorch's flop counter too. What is elementwise (losses, activations, batch norm, the
update itself) is not counted.

Whose gradient nobody needs decides how many products a layer has; see `Entry`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Entry(Enum):
    """Where a layer's input comes from."""

    DATA = "data"  # needs no gradient
    FEATURES = "features"  # needs one in the outer loop alone (ANIL)
    LAYER = "layer"  # needs one in both loops


# Products per inner step: Y = X Wᵀ, W' = Δᵀ X, X' = Δ W, and on the way back two adjoints of each;
# without X' unless it comes from a layer, without the adjoints in X where it is data.
STEP = {Entry.DATA: 4, Entry.FEATURES: 6, Entry.LAYER: 9}
# Y = X Wᵀ and its adjoints.
QUERY = {Entry.DATA: 2, Entry.FEATURES: 3, Entry.LAYER: 3}


@dataclass(frozen=True)
class Layer:
    """A linear or convolutional layer.

    Attributes:
        weight: the name of its weight.
        product: P of one sample.
        uncut: the same for the product that PyTorch's second derivative of a convolution takes for
            the weight's adjoint: it computes a kernel as large as the strides leave room for, and
            cuts it. P for others.
        positions: rows of one sample.
        entry: where its input comes from.
        linear: whether it is no convolution.
    """

    weight: str
    product: int
    uncut: int
    positions: int
    entry: Entry
    linear: bool

    def step(self, samples: int) -> int:
        """An inner step and the way back through it."""
        return STEP[self.entry] * samples * self.product

    def step_by_autograd(self, samples: int) -> int:
        """As PyTorch does it."""
        if self.linear or self.entry is Entry.FEATURES:
            return self.step(samples)
        if self.entry is Entry.LAYER:
            return samples * (8 * self.product + self.uncut)
        # The second derivative of a convolution gives the input's adjoint even where it is data.
        return self.step(samples) + samples * self.product

    def query(self, samples: int) -> int:
        """A forward and a backward pass."""
        return QUERY[self.entry] * samples * self.product


@dataclass(frozen=True)
class Kron:
    """The transform `U = A G C` of a `[batch, n, m]`.

    Attributes:
        batch: B.
        n: rows.
        m: columns.
        grams: whether A = LᵀL and C = RᵀR.
    """

    batch: int
    n: int
    m: int
    grams: bool = True

    @property
    def once(self) -> int:
        """U from A, G and C, in either order."""
        return 2 * self.batch * self.n * self.m * (self.n + self.m)

    @property
    def step(self) -> int:
        """U, and from its cotangent V those of G, A and C.

        With Q = A G kept: U = Q C; then Q' = V Cᵀ, G' = Aᵀ Q', A' = Q' Gᵀ, C' = Qᵀ V.
        """
        return 3 * self.once

    def phi_step(self, kept: int) -> int:
        """The cotangents of A and C for `g_k` by which φ moves, and the adjoints of the three.

        With Q = A G kept: Q' = V Cᵀ, C' = Qᵀ V, A' = Q' Gᵀ; with P = G C kept, the mirror image.

        Args:
            kept: the side that is multiplied twice: m where A G is kept, n where G C is.
        """
        return 3 * (self.once + 2 * self.batch * self.n * self.m * kept)


@dataclass(frozen=True)
class Modes:
    """Meta-Curvature of a convolution: one matrix per axis of `[a, b, f]`.

    Attributes:
        a: outputs.
        b: inputs.
        f: the kernel's elements.
    """

    a: int
    b: int
    f: int

    @property
    def step(self) -> int:
        """The three products, and two adjoints of each."""
        return 3 * 2 * self.a * self.b * self.f * (self.a + self.b + self.f)


Transform = Kron | Modes


@dataclass(frozen=True)
class Loop:
    """The sizes of the loop.

    Attributes:
        tasks: T.
        steps: K.
        support: samples in a task's support.
        query: samples in its query.
        adapt: whether φ, too, moves from the second step on (kfo-adapt).
    """

    tasks: int
    steps: int
    support: int
    query: int
    adapt: bool

    @property
    def phi_steps(self) -> int:
        """How many times φ moves in one task."""
        return max(0, self.steps - 1) if self.adapt else 0


def transform(t: Transform | None, loop: Loop, by_autograd: bool = False) -> int:
    """One parameter's transform in one task, without its grams.

    Args:
        t: the transform; None for an elementwise one.
        loop: the sizes.
        by_autograd: φ's step by the association that the reference has, A G; else the cheaper.
    """
    if t is None:
        return 0
    flops = loop.steps * t.step
    if isinstance(t, Kron) and loop.phi_steps:
        flops += loop.phi_steps * t.phi_step(t.m if by_autograd else min(t.n, t.m))
    return flops


def grams(t: Transform | None, loop: Loop) -> int:
    """`LᵀL`, `RᵀR` and their derivatives in the whole meta-batch, each computed once.

    φ_0 is that of all tasks; a φ that has moved is one task's own.
    """
    if not isinstance(t, Kron) or not t.grams or not loop.steps:
        return 0
    moved = loop.tasks * loop.phi_steps
    return sum((1 + moved) * gram(n) + moved * gram_phi_step(n) for n in (t.n, t.m))


def gram(n: int) -> int:
    """`LᵀL` (one triangle of it), and from the cotangent V of it that of L: `L (V + Vᵀ)`."""
    return n * n * (n + 1) + 2 * n**3


def gram_phi_step(n: int) -> int:
    """`L (V + Vᵀ)` as the step of L, and its two adjoints."""
    return 3 * 2 * n**3


def grams_by_autograd(t: Transform | None, loop: Loop) -> int:
    """As PyTorch does it: at every step of every task, in full, and two products on the way back.

    A step of φ is those two, and two adjoints of each.
    """
    if not isinstance(t, Kron) or not t.grams:
        return 0
    products = 3 * loop.steps + 6 * loop.phi_steps
    return loop.tasks * products * 2 * (t.n**3 + t.m**3)


def factored(layer: Layer, t: Kron, loop: Loop) -> int:
    """A linear layer and its transform in one task, without grams: the gradient stays `Δᵀ X`.

    `U = D E` with `D = A Δᵀ` and `E = X C` takes the place of the product W' = Δᵀ X. Both D and E
    need a cotangent; where X is data that of X is left out, but not the E' that C' is made of.
    """
    rows = loop.support * layer.positions
    data = layer.entry is Entry.DATA
    flops = loop.steps * layer.step(loop.support)
    if data:
        flops += loop.steps * layer.product * loop.support
    flops += loop.steps * 3 * 2 * t.n**2 * rows  # D, Δ', A'
    # X C once per task where neither X nor C changes, with E' summed over steps.
    times = loop.steps if loop.adapt or layer.entry is Entry.LAYER else min(1, loop.steps)
    flops += times * (2 if data else 3) * 2 * rows * t.m**2  # E, C', X'
    return flops + loop.phi_steps * _factored_phi_step(t, rows, data)


def _factored_phi_step(t: Kron, rows: int, data: bool) -> int:
    """`A' = Δ_kᵀ (X_k Eᵀ) Δ` and `C' = Xᵀ (Dᵀ Δ_kᵀ) X_k`, with D, E, Δ and X of the step before."""
    by_delta = 2 * (2 * rows**2 * t.n) + 2 * t.n**2 * rows
    by_x = 2 * (2 * rows**2 * t.m) + 2 * t.m**2 * rows
    return 3 * by_delta + (2 if data else 3) * by_x
