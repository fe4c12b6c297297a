"""Interleaved timing and what is read off it."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# A ratio whose quartiles lie further apart than this, relative to it, is not quoted.
UNSTABLE = 0.25
# Nor is any from a row during which more cores than this were at other work: it slows down whoever
# uses all cores, in every round alike.
BUSY_CORES = 0.15
LEAST, FEW, MOST = 7, 3, 25  # rounds; few where one is long
LONG_S = 3.0


def interleaved(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Time every run once per round, in random order, so that a noisy moment meets all of them.

    Args:
        runs: each does its work once and returns the seconds that took; all are warm.
        rounds: how many times each.

    Returns:
        Seconds, one number per round, by name.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order, names = random.Random(0), list(runs)
    for _ in range(rounds):
        order.shuffle(names)  # else the same one would always find what another left of the caches
        for name in names:
            samples[name].append(runs[name]())
    return samples


def rounds_for(seconds: float, one_round: float, most: int = MOST) -> int:
    """How many rounds fit into a time, within limits; two seconds' worth of them at least."""
    least = min(most, FEW if one_round > LONG_S else LEAST)
    return max(least, min(most, int(max(seconds, 2.0) / max(one_round, 1e-9))))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def times(samples: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles, in milliseconds."""
    low, median, high = quartiles(samples)
    return {"median_ms": 1e3 * median, "q1_ms": 1e3 * low, "q3_ms": 1e3 * high}


def speedup(samples: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """How many times as fast as the baseline, round by round."""
    low, median, high = quartiles([b / s for b, s in zip(baseline, samples, strict=True)])
    return {"median": median, "q1": low, "q3": high, "unstable": (high - low) > UNSTABLE * median}
