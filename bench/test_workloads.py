"""The workloads under pytest-benchmark: each peer that passes the gate.

    pytest bench/test_workloads.py --benchmark-only [-k sine-mlp]

For ratios use `fastkfo bench`: its rounds are interleaved.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import row, selection
from bench.peers import BY_DEFAULT

CASES = [
    pytest.param(problem, name, id=f"{problem.workload}-{problem.method}-{name}")
    for problem in selection.quick()
    for name in BY_DEFAULT
]


@pytest.mark.parametrize(("problem", "name"), CASES)
def test_meta_gradient(benchmark, device, problem, name):
    problem = replace(problem, device=device.type)
    entry, prepared = row.admit(name, problem, row.Oracle.of(problem))
    if entry["status"] != "ok":
        pytest.skip(f"{entry['status']}: {entry['why']}")
    benchmark.group = f"{problem.workload} {problem.method}"
    benchmark.pedantic(prepared.seconds, rounds=5, warmup_rounds=1)
    prepared.close()
