"""Several runs of the same problems as one: medians over runs, and how far the runs lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from bench.table import TIMED

Key = tuple[Any, ...]
SOMETIMES = ("peak_bytes", "launches", "compile_s", "replay_ms", "difference")
OF_ONE_RUN = ("peers", "floors", "took_s", "rounds", "busy_elsewhere")


def merged(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every problem once, in the order of the first run.

    Args:
        runs: of one record or of several; a problem is told by its names and sizes.

    Returns:
        Per problem what `_problem` says.
    """
    rows: dict[Key, list[dict[str, Any]]] = {}
    for run in runs:
        for row in run["rows"]:
            if "peers" in row and "axis" not in row:  # no sweep, nor a kernel alone
                rows.setdefault(_key(row), []).append(row)
    return [_problem(of_one) for of_one in rows.values()]


def _key(row: dict[str, Any]) -> Key:
    names = ("workload", "method", "tasks", "steps", "width", "dtype", "device")
    return tuple(row[name] for name in names)


def _problem(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sizes, floors (the least of the runs) and per peer what `_peer` says."""
    names = dict.fromkeys(name for row in rows for name in row["peers"])
    first = {k: v for k, v in rows[0].items() if k not in OF_ONE_RUN}
    return {
        **first,
        "floor_ms": min(row["floors"]["least_ms"] for row in rows),
        "peers": {
            name: _peer([row["peers"][name] for row in rows if name in row["peers"]])
            for name in names
        },
    }


def _peer(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Status of the worst run; median time; median ratio and the runs' lowest and highest."""
    last = next((e for e in entries if e["status"] != "ok"), entries[-1])
    merged: dict[str, Any] = {"status": last["status"], "why": last["why"]}
    timed = [e for e in entries if e["status"] in TIMED and "median_ms" in e]
    if not timed:
        return merged
    merged |= {
        "ms": statistics.median(e["median_ms"] for e in timed),
        "times_floor": statistics.median(e["times_floor"] for e in timed),
        "gate": max(e["gate"]["worst"] for e in timed),
        "wrong_by": max(e["gate"]["whole"] for e in timed),
        **{key: _median(e.get(key) for e in timed) for key in SOMETIMES},
    }
    ratios = [e["speedup"] for e in timed if "speedup" in e]
    if last["status"] == "ok" and ratios:
        medians = [ratio["median"] for ratio in ratios]
        merged |= {
            "runs": len(medians),
            "speedup": statistics.median(medians),
            "lowest": min(medians),
            "highest": max(medians),
            "unstable": any(ratio["unstable"] for ratio in ratios),
        }
    return merged


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
