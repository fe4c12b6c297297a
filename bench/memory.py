"""Peak memory of one meta-gradient: growth of the resident set, in a process of its own.

python bench/memory.py      # stores bench/results/memory.json
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def peaks(workload: str, method: str) -> dict[str, float]:
    """MiB above what the process held before, by library."""
    return {
        library: min(
            float(
                subprocess.run(
                    [sys.executable, __file__, library, workload, method],
                    capture_output=True, text=True, check=True, cwd=ROOT,
                ).stdout
            )
            for _ in range(2)
        )
        for library in ("learn2learn", "fastkfo")
    }  # fmt: skip


def _main(library: str, workload: str, method: str) -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    import fastkfo
    from bench import workloads
    from tests.oracle import learn2learn

    torch.set_num_threads(1)
    # One step on a small learner first, so that code and threads are not counted.
    for name in (library,):
        l2l = fastkfo if name == "fastkfo" else learn2learn()
        small = workloads.anil_head()
        workloads.meta_gradient(workloads.make_learner(l2l, small, method), small)
    work = workloads.WORKLOADS[workload]()
    learner = workloads.make_learner(l2l, work, method)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        workloads.meta_gradient(learner, work)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def _all() -> None:
    sys.path.insert(0, str(ROOT))
    from bench import measure

    rows = []
    for workload in ("sine-mlp", "omniglot-cnn", "cifarfs-cnn-2"):
        for method in ("maml", "kfo", "kfo-adapt"):
            row = {"workload": workload, "method": method, "peak_mib": peaks(workload, method)}
            rows.append(row)
            print(row, flush=True)
            measure.save("memory", {"threads_while_read": 1, "rows": rows})


if __name__ == "__main__":
    _main(*sys.argv[1:]) if len(sys.argv) > 1 else _all()
