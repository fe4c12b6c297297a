"""How much of an inner loop is kept for its meta-gradient.

"full"        the whole graph, which may be differentiated to any order (walk.unrolled).
"checkpoint"  the state before every step; a step is computed again, and differentiated as one.
"adjoint"     θ before every step (and φ, where it is adapted, and an optimizer's state). With λ
              the cotangent of θ,

    V_k = (∂(θ_k − lr U(g_k))/∂g_k)ᵀ λ_{k+1}        λ_k = λ_{k+1} + H_k V_k

              where g_k is computed again and H_k V_k is one product with its Hessian.

docs/inner_loop.md has the derivation.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from fastkfo.inner_loop.backwards import Adjoint, Checkpoint
from fastkfo.inner_loop.cotangents import check_differentiated_once
from fastkfo.inner_loop.leaves import Layout, Leaves
from fastkfo.inner_loop.run import Run
from fastkfo.inner_loop.walk import Walk

MODES = ("full", "checkpoint", "adjoint")


class Recomputed(Function):
    """The query losses of a run, which keeps states and no graph."""

    @staticmethod
    def forward(ctx: Any, run: Run, layout: Layout, shape: Leaves, *flat: Tensor) -> Tensor:
        """`[T]`; whatever else came of it is in `run.outcome`."""
        leaves = shape.like(flat)
        walk = Walk(run, leaves, layout.batch(leaves.data), keep=True)
        ctx.walk, ctx.layout, ctx.shape = walk, layout, shape
        ctx.save_for_backward(*flat)
        ctx.set_materialize_grads(False)
        run.outcome = walk.outcome
        assert walk.outcome.loss is not None
        return walk.outcome.loss

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Any, ...]:
        """Step by step."""
        check_differentiated_once("memory")
        if cotangent is None:
            return (None,) * (3 + len(ctx.needs_input_grad[3:]))
        leaves = ctx.shape.like(ctx.saved_tensors).detached()
        kind = Adjoint if ctx.walk.run.settings.memory == "adjoint" else Checkpoint
        backwards = kind(ctx.walk, leaves, ctx.layout.batch(leaves.data))
        return (None, None, None, *backwards(cotangent).flat())
