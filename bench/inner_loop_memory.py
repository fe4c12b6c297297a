"""What memory an inner loop takes, by mode, steps and chunks: `python -m bench.inner_loop_memory`.

Every case in a process of its own, in which every larger tensor is a mapping of its own: else the
resident set would show what malloc keeps for later, which grows with the number of calls.
The record goes to `bench/results/<machine>/memory/inner-loop.json`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.records import RESULTS

MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
READINGS = 3
MODES = ("full", "checkpoint", "adjoint")
CASES = (
    *(("cifarfs-cnn-2", 4, k, {"memory": mode}) for k in (2, 20) for mode in MODES),
    *(("omniglot-cnn", 16, k, {"memory": "adjoint"}) for k in (2, 10, 20)),
    *(("omniglot-cnn", t, 2, {"chunk_size": 16}) for t in (16, 64, 256)),
    *(("omniglot-cnn", t, 2, {"chunk_size": None}) for t in (16, 64)),
)  # fmt: skip


def case(workload: str, tasks: int, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of one meta-gradient, and what it takes to tell what that is made of."""
    import fastkfo
    from bench import memory
    from bench.problem import Learned, Problem

    problem = Problem.named(workload, "kfo", tasks=tasks, steps=steps)
    learner: Any = problem.learner(fastkfo)
    inner_loop = fastkfo.InnerLoop(learner, problem.loss, steps, **options)
    learned = Learned(None, learner)

    def run() -> None:
        learned.clear()
        inner_loop(*problem.data).loss.sum().backward()

    run()
    peaks = [memory.peak_bytes(run) for _ in range(READINGS)]
    theta = sum(p.numel() * p.element_size() for p in learner.module.parameters())
    return {
        "workload": workload,
        "tasks": tasks,
        "steps": steps,
        **options,
        "peak_bytes": statistics.median(x for x in peaks if x is not None),
        "theta_bytes": tasks * theta,
        "input_bytes": sum(x.numel() * x.element_size() for x in problem.data),
    }


def time_ratio(workload: str, tasks: int, steps: int, rounds: int = 3) -> dict[str, Any]:
    """Seconds of the memory modes, interleaved, as ratios to "full"; malloc as it is by default."""
    import fastkfo
    from bench import clock, measure
    from bench.problem import Problem

    problem = Problem.named(workload, "kfo", tasks=tasks, steps=steps)
    runs = {}
    for mode in ("full", "checkpoint", "adjoint"):
        loop = fastkfo.InnerLoop(problem.learner(fastkfo), problem.loss, steps, memory=mode)
        runs[mode] = lambda loop=loop: clock.seconds(
            lambda: loop(*problem.data).loss.sum().backward(), "cpu"
        )
        runs[mode]()
    samples = measure.interleaved(runs, rounds)
    ratios = {
        mode: [s / f for s, f in zip(samples[mode], samples["full"], strict=True)]
        for mode in samples
    }
    return {
        "workload": workload,
        "tasks": tasks,
        "steps": steps,
        "rounds": rounds,
        "median_s": {mode: statistics.median(s) for mode, s in samples.items()},
        "times_full": {mode: measure.quartiles(r) for mode, r in ratios.items()},
    }


def _in_own_process(what: str, *arguments: Any, mapped: bool) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.inner_loop_memory", what, json.dumps(arguments)],
        env=os.environ | (MAPPED if mapped else {}),
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    """All cases into the record."""
    from bench import machine

    rows = []
    for one in CASES:
        rows.append(_in_own_process("case", *one, mapped=True))
        print(json.dumps(rows[-1]), flush=True)
    times = [_in_own_process("time_ratio", "cifarfs-cnn-2", 4, 20, mapped=False)]
    print(json.dumps(times), flush=True)
    path = RESULTS / machine.name("cpu") / "memory" / "inner-loop.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"environment": machine.environment("cpu"), "cases": rows, "times": times}
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(globals()[sys.argv[1]](*json.loads(sys.argv[2]))))
    else:
        main()
