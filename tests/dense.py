"""The oracle of the fused ops: dense Kronecker products by plain PyTorch, and how to compare.

Nothing of fastkfo is used here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.cases import Operands


def dense_transform(grads, left, right, bias, scale, *, psd=False):
    """The oracle: `vec(A G C) = (A ⊗ Cᵀ) vec(G)`, task by task and matrix by matrix."""
    return [_dense_item(*item, psd) for item in zip(grads, left, right, bias, scale, strict=True)]


def dense_update(params, grads, left, right, bias, scale, *, lr, psd=False):
    """`θ − lr S ∘ (A G C + β)`."""
    rates = lr if isinstance(lr, list) else [lr] * len(grads)
    updates = dense_transform(grads, left, right, bias, scale, psd=psd)
    return [p - rate * u for p, rate, u in zip(params, rates, updates, strict=True)]


def _dense_item(grad, left, right, bias, scale, psd):
    tasks = next((x.shape[0] for x in (left, right, bias) if x is not None and x.dim() == 3), None)
    if left is None and right is None and bias is None:
        return grad if scale is None else grad * scale
    if tasks is not None:
        grad = (grad.unsqueeze(0) if grad.dim() < 3 else grad).expand(
            tasks, *grad.shape[0 if grad.dim() < 3 else 1 :]
        )
    shape = grad.shape
    inner = shape if tasks is None else shape[1:]
    n, m = (inner[-2], inner[-1]) if len(inner) > 1 else (inner[0], 1)
    outer = 1 if tasks is None else tasks

    def of_task(x, t):
        return x if x is None or x.dim() == 2 else x[t]

    def factor(x, t, size):
        if x is None:
            return torch.eye(size, dtype=grad.dtype, device=grad.device)
        x = of_task(x, t)
        return torch.einsum("ri,rj->ij", x, x) if psd else x

    batch = 1
    for size in inner[:-2]:
        batch *= size
    rows = grad.reshape(outer, batch, n, m)
    out = []
    for t in range(outer):
        a, c, g = factor(left, t, n), factor(right, t, m), rows[t]
        if 0 < n * m <= 64:
            u = (
                torch.kron(a.contiguous(), c.T.contiguous()) @ g.reshape(batch, n * m).T
            ).T.reshape(batch, n, m)
        else:
            u = torch.einsum("ij,bjk,kl->bil", a, g, c)
        out.append(u if bias is None else u + of_task(bias, t))
    u = torch.stack(out).reshape(shape) if out else rows.reshape(shape) * 1
    return u if scale is None else u * scale


def derivatives(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], order: int, absolute: bool = False
) -> list[Tensor]:
    """The gradients of random combinations of the outputs, and theirs, up to `order`.

    What the result does not depend on has a gradient of zeros. With `absolute`, the combinations
    have positive coefficients.
    """
    generator = torch.Generator().manual_seed(1)
    results: list[Tensor] = []
    current, wrt = list(outputs), list(inputs)
    for k in range(order):
        seeds = [
            torch.randn(x.shape, generator=generator, dtype=torch.float64).bfloat16().to(x)
            for x in current
        ]
        seeds = [(s.abs() if absolute else s).requires_grad_() for s in seeds]
        total = sum((x * s).sum() for x, s in zip(current, seeds, strict=True))
        # Derivatives are linear in the seeds: from the second on these are inputs like others.
        given = torch.autograd.grad(
            total, wrt, create_graph=k + 1 < order, allow_unused=True, materialize_grads=True
        )
        current, wrt = list(given), wrt + seeds
        results += given
    return results


def magnitudes(x: Operands, order: int) -> list[Tensor]:
    """`dense_update` and its derivatives with every summand positive: what errors scale with."""
    x = x.dense().map(torch.abs)
    rates = [-rate for rate in x.rates()]
    x.lr = rates if isinstance(x.lr, list) else rates[0]
    x = x.map(lambda t: t.detach().requires_grad_())
    out = x.update(dense_update)
    return [*out, *derivatives(out, x.tensors(), order, absolute=True)]


def assert_near(
    actual: Tensor, expected: Tensor, tolerance: float, name: str = "", scale: Tensor | None = None
) -> None:
    """Normwise: `|actual − expected| ≤ tolerance · |scale or expected|`; shapes must agree."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} for {expected.shape}"
    if actual.numel() == 0:
        return
    wanted = expected.detach().double()
    error = (actual.detach().double() - wanted).norm().item()
    size = (wanted if scale is None else scale).norm().item()
    assert error <= tolerance * max(size, 1e-3), f"{name}: error {error:.3e} of {size:.3e}"


def worst(op, x, **options):
    """The largest relative error of values and gradients, norm by norm."""
    leaves, exact = x.leaves(), x.dense().leaves()
    out, want = leaves.update(op, **options), exact.update(dense_update)
    found = [*out, *derivatives(out, leaves.tensors(), 2)]
    wanted = [*want, *derivatives(want, exact.tensors(), 2)]
    return max([
        ((a.double() - b).norm() / b.norm()).item()
        for a, b in zip(found, wanted, strict=True) if b.norm() > 0
    ])  # fmt: skip
