"""How time and memory grow with tasks, steps or width, and where each implementation ends."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from rich.table import Table

from bench import memory
from bench.peers import ORACLE, peer
from bench.peers.base import Prepared
from bench.problem import Problem
from bench.row import Oracle, Tell, admit, compare, failure, guarded
from bench.table import mebibytes, number

ROUNDS = 5
FEW_ROUNDS = 3  # where one takes longer than LONG_ROUND_S
LONG_ROUND_S = 1.0
# The axis, its values (widths as multiples of the workload's), and the power of it by which time
# and memory are expected to grow at most.
AXES: dict[str, tuple[tuple[float, ...], int]] = {
    "tasks": ((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), 1),
    "steps": ((1, 2, 3, 5, 10, 20), 1),
    "width": ((0.25, 0.5, 1, 2, 4), 2),
}
# A GPU runs more tasks at a time than a CPU has caches for, and is lent by the minute.
ON_CUDA: dict[str, tuple[float, ...]] = {
    "tasks": (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    "steps": (1, 2, 5, 10, 20, 50),
}
LONGEST_S = {"cpu": 15.0, "cuda": 4.0}  # one call; a peer that would take longer is stopped
# learn2learn's loop on a GPU: a few points show that it grows as T.
LONGEST_BASELINE_S = {"cpu": 15.0, "cuda": 0.7}
# An oracle that takes longer is not run: points from there on are not gated.
GATE_S = {"cpu": 4.0, "cuda": 3.0}
LINEAR = 0.9  # a slope from which time counts as growing in proportion
SHARE_OF_MEMORY = 0.8


def read(
    problem: Problem, axis: str, names: Sequence[str], until: float, tell: Tell = lambda text: None
) -> Iterator[dict[str, Any]]:
    """Measure a problem at every value of an axis, with every peer until it ends.

    Args:
        problem: what is computed; its own value of the axis is not used, but for the width's unit.
        axis: one of AXES.
        names: of the peers.
        until: no point is begun later, by time.monotonic().
        tell: is told what is being done.

    Yields:
        The row of a record after every point: per peer its points, its slope, why it ended.
    """
    values, power = values_of(axis, problem.device)
    unit = problem.width if axis == "width" else 1
    found: dict[str, dict[str, Any]] = {n: {"points": [], "stopped": None} for n in names}
    dtype = str(problem.dtype).removeprefix("torch.")
    row = {**asdict(problem), "dtype": dtype, "axis": axis, "peers": found}
    oracle_s, last_x = 0.0, 1
    for x in (int(unit * value) for value in values):
        if time.monotonic() > until:
            for entry in found.values():
                entry["stopped"] = entry["stopped"] or f"out of time before {x}"
            break
        here = replace(problem, **{axis: x})
        tell(f"{here.label}: {', '.join(n for n in names if not found[n]['stopped'])}")
        begin = time.monotonic()
        affordable = oracle_s * (x / last_x) ** power < GATE_S[problem.device]
        oracle = _oracle(here) if affordable else None
        oracle_s, last_x = time.monotonic() - begin if oracle else math.inf, x
        _point(here, x, power, oracle, found)
        for entry in found.values():
            times = [(p["x"], p["median_ms"]) for p in entry["points"]]
            entry["slope"], entry["linear_from"] = slope(times), linear_from(times)
        yield row
        if all(entry["stopped"] for entry in found.values()):
            break
    yield row


def values_of(axis: str, device: str) -> tuple[tuple[float, ...], int]:
    """An axis' values on a device, and its power."""
    values, power = AXES[axis]
    return (ON_CUDA.get(axis, values) if device == "cuda" else values), power


def linear_from(points: Sequence[tuple[float, float]]) -> float | None:
    """The first x from which on y grows in proportion, three points at least; or None."""
    found = None
    for k in range(len(points) - 2, -1, -1):
        (x, y), (after_x, after_y) = points[k : k + 2]
        if math.log(after_y / y) < LINEAR * math.log(after_x / x):
            break
        if k <= len(points) - 3:
            found = x
    return found


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """The power of x by which y grows: least squares over the upper half, in logarithms."""
    upper = points[-max(3, (len(points) + 1) // 2) :]
    if len(upper) < 3:
        return None
    x, y = ([math.log(value) for value in column] for column in zip(*upper, strict=True))
    return statistics.linear_regression(x, y).slope


def _point(
    problem: Problem, x: int, power: int, oracle: Oracle | None, found: dict[str, dict[str, Any]]
) -> None:
    entries: dict[str, dict[str, Any]] = {}
    ready: dict[str, Prepared] = {}
    try:
        for name, peer_found in found.items():
            if peer_found["stopped"] is None:
                peer_found["stopped"] = _too_much(
                    peer_found["points"], x, power, problem.device, longest(name, problem.device)
                )
            if peer_found["stopped"] is None:
                entries[name], prepared = _made_ready(name, problem, oracle)
                if prepared is not None:
                    ready[name] = prepared
        compare(entries, ready, 0.0, most=_rounds([found[name]["points"] for name in ready]))
        for name, entry in entries.items():
            guarded(name, entries, ready, partial(_read_peak, entry=entry))
            if name in ready:
                found[name]["points"].append({"x": x, "gated": oracle is not None, **entry})
            else:
                found[name]["stopped"] = f"at {x}: {entry['why']}"
    finally:
        for prepared in ready.values():
            prepared.close()
        ready.clear()
        memory.give_back(problem.device)


def _read_peak(prepared: Prepared, entry: dict[str, Any]) -> None:
    entry["peak_bytes"] = prepared.peak_bytes()


def _oracle(problem: Problem) -> Oracle | None:
    """None where it cannot be computed: the point is then not gated, and says so."""
    try:
        return Oracle.of(problem)
    except (MemoryError, torch.OutOfMemoryError):
        return None


def _made_ready(
    name: str, problem: Problem, oracle: Oracle | None
) -> tuple[dict[str, Any], Prepared | None]:
    """Through the gate where there is one to go through, else warmed up."""
    if oracle is not None:
        return admit(name, problem, oracle)
    try:
        prepared = peer(name).prepare(problem)
        prepared.gradient()
    except Exception as error:
        return failure(error), None
    return {"status": "not gated", "why": None}, prepared


def wrong(entry: dict[str, Any]) -> str | None:
    """What the gate said of a peer where it said anything: one wrong point is enough."""
    return next((p["why"] for p in entry["points"] if p["status"] == "wrong"), None)


def _rounds(points: list[list[dict[str, Any]]]) -> int:
    """How many rounds, by what the last point took."""
    last_ms = sum(own[-1]["median_ms"] for own in points if own)
    return ROUNDS if last_ms < 1e3 * LONG_ROUND_S else FEW_ROUNDS


def longest(name: str, device: str) -> float:
    """How many seconds one call of a peer may take."""
    return (LONGEST_BASELINE_S if name == ORACLE else LONGEST_S)[device]


def _too_much(
    points: list[dict[str, Any]], x: int, power: int, device: str, longest_s: float
) -> str | None:
    """Why the next point is not tried, told from the last one."""
    if not points:
        return None
    last = points[-1]
    growth = (x / last["x"]) ** power
    if last["median_ms"] * growth > 1e3 * longest_s:
        return f"at {x} a call would take about {last['median_ms'] * growth / 1e3:.0f} s"
    needed = (last["peak_bytes"] or 0) * growth
    if device == "cpu" and needed > SHARE_OF_MEMORY * memory.available():
        return f"at {x} it would need about {needed / 2**30:.0f} GiB"
    return None  # on CUDA, running out of memory is an error that can be caught


def cells(entry: dict[str, Any]) -> tuple[str, str, str]:
    """One peer's points, slope (and from where on it is one) and end, as text."""
    points = ", ".join(
        f"{p['x']}: {number(p['median_ms'])} ({mebibytes(p['peak_bytes'])})"
        for p in entry["points"]
    )
    end = "; ".join(filter(None, [wrong(entry), entry["stopped"]]))
    first = entry.get("linear_from")
    since = "" if first is None else f", linear from {first:g}"
    return points, f"{number(entry.get('slope'))}{since}", end


def table(rows: list[dict[str, Any]]) -> Table:
    """One line per problem and peer: milliseconds and MiB at each value, slope, and the end."""
    shown = Table("peer", "x: ms (MiB)", "slope", "ends", title="scaling", title_style="bold")
    for row in rows:
        shown.add_section()
        shown.add_row(f"[bold]{row['workload']}[/] {row['method']}", row["axis"], "", "")
        for name, entry in row["peers"].items():
            shown.add_row(name, *cells(entry))
    return shown
