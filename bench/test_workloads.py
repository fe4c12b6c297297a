"""The workloads under pytest-benchmark: each peer that passes the gate.

    pytest bench/test_workloads.py --benchmark-only [-k sine-mlp]

For ratios use `fastkfo bench`: its rounds are interleaved.
"""

from __future__ import annotations

import pytest
import torch

from bench import gate, selection
from bench.peers import BY_DEFAULT, peer
from bench.problem import Problem
from bench.row import oracle_of

CASES = [
    pytest.param(problem, name, id=f"{problem.workload}-{problem.method}-{name}")
    for problem in selection.quick()
    for name in BY_DEFAULT
]


@pytest.mark.parametrize(("problem", "name"), CASES)
def test_meta_gradient(benchmark, device, problem, name):
    problem = Problem.named(problem.workload, problem.method, device=device.type)
    implementation = peer(name)
    if reason := implementation.missing() or implementation.declines(problem):
        pytest.skip(reason)
    exact = implementation.prepare(problem.to(torch.float64))
    found = gate.difference(exact.gradient(), oracle_of(problem))
    exact.close()
    if not found.passes:
        pytest.skip(found.text())
    prepared = implementation.prepare(problem)
    benchmark.group = f"{problem.workload} {problem.method}"
    benchmark.pedantic(prepared.seconds, rounds=5, warmup_rounds=1)
    prepared.close()
