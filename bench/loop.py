"""The unchanged learn2learn loop on fastkfo against learn2learn itself, in one run.

    python bench/loop.py [--workload NAME ...] [--method NAME ...] [--seconds S]

A row is timed only if both float64 meta-gradients agree to 1e-9, normwise.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fastkfo
from bench import measure, workloads
from tests.oracle import learn2learn


def difference(a: list, b: list) -> float:
    """The normwise relative difference of two meta-gradients."""
    flat = [torch.cat([g.flatten().double() for g in grads if g is not None]) for grads in (a, b)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def gate(workload: workloads.Workload, method: str) -> float:
    """How far fastkfo's meta-gradient is from learn2learn's in float64, for the worst parameter."""
    tasks = [(x.double(), _double(y), q.double(), _double(z)) for x, y, q, z in workload.tasks]
    double = workload._replace(tasks=tasks)
    theirs, ours = (
        workloads.meta_gradient(_moved(workloads.make_learner(lib, workload, method)), double)
        for lib in (learn2learn(), fastkfo)
    )
    if [g is None for g in ours] != [g is None for g in theirs]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None]
    # A convolution's bias before batch norm has a zero gradient: that is compared with the whole.
    floor = 1e-3 * max(float(b.norm()) for _, b in pairs)
    return max(float((a - b).norm() / max(float(b.norm()), floor)) for a, b in pairs)


def _moved(learner: torch.nn.Module) -> torch.nn.Module:
    """The learner in float64, off the identity, where a transposed factor would not show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in learner.double().parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return learner


def _double(y: torch.Tensor) -> torch.Tensor:
    return y.double() if y.is_floating_point() else y


def run(name: str, method: str, seconds: float) -> dict:
    """One row: parity, then times."""
    torch.manual_seed(0)
    workload = workloads.WORKLOADS[name]()
    wrong_by = gate(workload, method)
    row: dict = {"workload": name, "method": method, "difference": wrong_by}
    if not wrong_by < 1e-9:
        return {**row, "refused": "the float64 meta-gradients differ"}
    learners = {
        "learn2learn": workloads.make_learner(learn2learn(), workload, method),
        "fastkfo": workloads.make_learner(fastkfo, workload, method),
    }
    start = time.perf_counter()
    grads = {k: workloads.meta_gradient(v, workload) for k, v in learners.items()}
    # For information: a ReLU that rounding switches moves it by 1e-3, in learn2learn as well.
    row["difference_float32"] = difference(grads["fastkfo"], grads["learn2learn"])
    rounds = min(40, max(5, int(seconds / (time.perf_counter() - start))))
    runs = {k: lambda v=v: workloads.meta_gradient(v, workload) for k, v in learners.items()}
    samples = measure.interleaved(runs, rounds, warmup=1)
    row["times"] = measure.summary(samples, "learn2learn")
    row["samples_s"] = samples
    return row


def main() -> None:
    """Run the rows asked for, print the table, store the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", nargs="*", default=list(workloads.WORKLOADS))
    parser.add_argument("--method", nargs="*", default=["maml", "kfo", "kfo-adapt"])
    parser.add_argument("--seconds", type=float, default=15, help="per row, about")
    parser.add_argument("--save", default=None, help="name of the record under bench/results")
    options = parser.parse_args()
    print("workload        method          learn2learn   fastkfo               faster   differ")
    rows = []
    for name in options.workload:
        for method in options.method:
            row = run(name, method, options.seconds)
            rows.append(row)
            if options.save:  # after every row, so that an interrupted run leaves what it has
                measure.save(options.save, {"rows": rows})
            if "refused" in row:
                print(f"{name:15} {method:14} refused: wrong by {row['difference']:.1e}")
                continue
            t = row["times"]
            f = t["fastkfo"]
            ratio = f"{f['speedup']:.2f} ({f['speedup_q1']:.2f}-{f['speedup_q3']:.2f})"
            print(
                f"{name:15} {method:14} {t['learn2learn']['median_ms']:9.1f} ms "
                f"{f['median_ms']:6.1f} ms {ratio:>18} {row['difference']:8.0e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
