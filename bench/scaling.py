"""How time and memory grow with tasks, steps or width, and where each implementation ends."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.table import Table

from bench import measure, memory
from bench.peers import peer
from bench.peers.base import Prepared
from bench.problem import Problem
from bench.row import Tell, admit, failure, oracle_of
from bench.table import number

ROUNDS = 5
# The axis, its values (widths as multiples of the workload's), and the power of it by which time
# and memory are expected to grow at most.
AXES: dict[str, tuple[tuple[float, ...], int]] = {
    "tasks": ((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), 1),
    "steps": ((1, 2, 3, 5, 10, 20), 1),
    "width": ((0.25, 0.5, 1, 2, 4), 2),
}
LONGEST_S = 15.0  # one call; a peer that would take longer is stopped
SHARE_OF_MEMORY = 0.8


def read(
    problem: Problem,
    axis: str,
    names: Sequence[str],
    seconds: float,
    ceilings: dict[str, Any],
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Measure a problem at every value of an axis, with every peer until it ends.

    Args:
        problem: what is computed; its own value of the axis is not used, but for the width's unit.
        axis: one of AXES.
        names: of the peers.
        seconds: for all of it, about: shares it out over the points.
        ceilings: not used, no floor is drawn.
        tell: is told what is being done.

    Returns:
        The row of a record: per peer its points, its slope, and why it ended where it did.
    """
    values, power = AXES[axis]
    unit = problem.width if axis == "width" else 1
    sizes = [int(unit * value) for value in values]
    first = replace(problem, **{axis: sizes[0]})
    tell(f"{first.label}: gate")
    oracle = oracle_of(first)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        entry, prepared = admit(name, first, oracle)
        found[name] = entry | {"points": [], "stopped": None if prepared else entry["why"]}
        if prepared:
            prepared.close()
    for x in sizes:
        here = replace(problem, **{axis: x})
        tell(f"{here.label}: {', '.join(n for n in names if not found[n]['stopped'])}")
        _point(here, x, power, seconds / len(sizes), found)
    for entry in found.values():
        entry["slope"] = slope([(p["x"], p["median_ms"]) for p in entry["points"]])
    dtype = str(problem.dtype).removeprefix("torch.")
    return {**asdict(problem), "dtype": dtype, "axis": axis, "peers": found}


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """The power of x by which y grows: least squares over the upper half, in logarithms."""
    upper = points[-max(3, (len(points) + 1) // 2) :]
    if len(upper) < 3:
        return None
    x, y = ([math.log(value) for value in column] for column in zip(*upper, strict=True))
    return statistics.linear_regression(x, y).slope


def _point(
    problem: Problem, x: int, power: int, seconds: float, found: dict[str, dict[str, Any]]
) -> None:
    ready: dict[str, Prepared] = {}
    try:
        for name, entry in found.items():
            if entry["stopped"] is None:
                entry["stopped"] = _too_much(entry["points"], x, power, problem.device)
            if entry["stopped"] is None:
                try:
                    ready[name] = peer(name).prepare(problem)
                    ready[name].gradient()
                except Exception as error:
                    entry["stopped"] = failure(error)["why"]
                    if name in ready:
                        ready.pop(name).close()
        once = sum(prepared.seconds() for prepared in ready.values())
        rounds = measure.rounds_for(seconds, once, most=ROUNDS)
        samples = measure.interleaved({n: p.seconds for n, p in ready.items()}, rounds)
        for name, taken in samples.items():
            point = {"x": x, **measure.times(taken), "samples_s": taken}
            point["peak_bytes"] = ready[name].peak_bytes()
            found[name]["points"].append(point)
    finally:
        for prepared in ready.values():
            prepared.close()


def _too_much(points: list[dict[str, Any]], x: int, power: int, device: str) -> str | None:
    """Why the next point is not tried, told from the last one."""
    if not points:
        return None
    last = points[-1]
    growth = (x / last["x"]) ** power
    if last["median_ms"] * growth > 1e3 * LONGEST_S:
        return f"at {x} a call would take about {last['median_ms'] * growth / 1e3:.0f} s"
    needed = (last["peak_bytes"] or 0) * growth
    if device == "cpu" and needed > SHARE_OF_MEMORY * memory.available():
        return f"at {x} it would need about {needed / 2**30:.0f} GiB"
    return (
        None  # on CUDA running out of memory is an error that can be caught, not a killed process
    )


def table(rows: list[dict[str, Any]]) -> Table:
    """One line per problem and peer: milliseconds and MiB at each value, slope, and the end."""
    shown = Table("peer", "x: ms (MiB)", "slope", "stopped", title="scaling", title_style="bold")
    for row in rows:
        shown.add_section()
        shown.add_row(f"[bold]{row['workload']}[/] {row['method']}", row["axis"], "", "")
        for name, entry in row["peers"].items():
            points = ", ".join(
                f"{p['x']}: {number(p['median_ms'])} ({(p['peak_bytes'] or 0) / 2**20:.0f})"
                for p in entry["points"]
            )
            power = "" if entry["slope"] is None else f"{entry['slope']:.2f}"
            wrong = "wrong; " if entry["status"] == "wrong" else ""
            shown.add_row(name, points, power, wrong + (entry["stopped"] or ""))
    return shown
