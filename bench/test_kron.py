"""kron_update alone: against the per-parameter PyTorch formula, and against plain BLAS.

python bench/kron.py [--save NAME]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import measure, workloads
from fastkfo.functional import kron_update


def four_blocks() -> tuple[list, list, list, list]:
    """θ, G, L, R of every parameter of `omniglot-cnn`, as matrices."""
    params = [p.detach() for p in workloads.omniglot_cnn().model().parameters()]
    views = []
    for p in params:
        n, m = (p.shape[0], 1) if p.dim() < 2 else (p.shape[1], p[0, 0].numel())
        views.append(p.reshape(p.shape) if p.dim() == 2 else p.reshape(-1, n, m))
    eye = lambda n: torch.eye(n) + 0.1 * torch.randn(n, n)  # noqa: E731
    return (
        views,
        [torch.randn_like(v) for v in views],
        [eye(v.shape[-2]) for v in views],
        [eye(v.shape[-1]) for v in views],
    )


def formula(params: list, grads: list, left: list, right: list, lr: float) -> list:
    """What learn2learn computes: one parameter at a time, psd factors."""
    return [
        p - lr * ((a.t() @ a) @ g @ (c.t() @ c))
        for p, g, a, c in zip(params, grads, left, right, strict=True)
    ]


def main() -> None:
    """Time both comparisons, print them, store the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", default=None)
    options = parser.parse_args()
    torch.manual_seed(0)
    args = four_blocks()
    # Against the formula, forward under no_grad, then forward and backward.
    learnable = [[x.clone().requires_grad_() for x in group] for group in args]

    def forward_backward(update):
        torch.autograd.backward([u.sum() for u in update(*learnable)])

    fused = lambda *a: kron_update(*a, lr=0.1, psd=True)  # noqa: E731
    plain = lambda *a: formula(*a, 0.1)  # noqa: E731
    worst = max(
        float((a - b).norm() / b.norm())
        for a, b in zip(fused(*args), plain(*[[x.double() for x in g] for g in args]), strict=True)
    )
    big = [torch.randn(1024, 1024) for _ in range(4)]
    wide = [[b] for b in big]
    comparisons = {
        "4-block CNN, forward": {
            "formula": lambda: plain(*args), "kron_update": lambda: fused(*args)
        },
        "4-block CNN, forward and backward": {
            "formula": lambda: forward_backward(plain),
            "kron_update": lambda: forward_backward(fused),
        },
        "1024 x 1024 factors": {
            "BLAS": lambda: big[2] @ big[1] @ big[3],
            "kron_update": lambda: kron_update(*wide, lr=0.1),
        },
    }  # fmt: skip
    record: dict = {"difference": worst, "comparisons": {}}
    for title, runs in comparisons.items():
        samples = measure.interleaved(runs, rounds=40 if "1024" in title else 200, warmup=5)
        table = measure.summary(samples, next(iter(runs)))
        record["comparisons"][title] = table
        for name, row in table.items():
            print(f"{title:36} {name:12} {row['median_ms']:9.3f} ms  x {row['speedup']:.2f}")
    print(f"largest normwise difference from the float64 formula: {worst:.1e}")
    if options.save:
        print(measure.save(options.save, record))


if __name__ == "__main__":
    main()
