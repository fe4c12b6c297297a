"""Interleaved timing and its record: what every benchmark here is made of."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def interleaved(
    runs: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Time every run once per round, in turn, so that a noisy moment meets all of them.

    Args:
        runs: what to time, by name.
        rounds: how many times each.
        warmup: untimed rounds before.

    Returns:
        Seconds, one number per round, by name.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(warmup + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_ >= warmup:
                samples[name].append(time.perf_counter() - start)
    return samples


def summary(samples: Mapping[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Medians and quartiles in milliseconds, and of the baseline's ratio, round by round."""
    table = {}
    for name, seconds in samples.items():
        low, median, high = statistics.quantiles(seconds, n=4)
        ratios = [b / s for b, s in zip(samples[baseline], seconds, strict=True)]
        q1, ratio, q3 = statistics.quantiles(ratios, n=4)
        table[name] = {
            "median_ms": 1e3 * median,
            "q1_ms": 1e3 * low,
            "q3_ms": 1e3 * high,
            "speedup": ratio,
            "speedup_q1": q1,
            "speedup_q3": q3,
        }
    return table


def environment() -> dict[str, Any]:
    """The machine, the versions and the commit that a record was made with."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "--", "csrc", "fastkfo"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")),
        platform.processor(),
    )  # fmt: skip
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def save(name: str, record: dict[str, Any]) -> Path:
    """Write a record to `results/<name>.json` with the environment."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **record}, indent=1) + "\n")
    return path
