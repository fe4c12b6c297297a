"""Rows as a table in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from bench.measure import BUSY_CORES

# Every column, and how wide a terminal has to be to have it.
COLUMNS = {
    "peer": 0, "ms (quartiles)": 0, "times as fast": 0, "x floor": 90, "peak MiB": 100,
    "launches": 112, "compile s": 124, "gate": 0,
}  # fmt: skip
TIMED = ("ok", "wrong")


def problems(rows: list[dict[str, Any]], width: int) -> Table:
    """All rows of a run, one section per problem; whoever failed the gate stands below."""
    shown = [name for name, least in COLUMNS.items() if width >= least]
    table = Table(*shown, title="one meta-gradient", title_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_section()
        for cells in (_head(row), *map(_peer, _sorted(row))):
            table.add_row(*(cells.get(name, "") for name in shown))
    return table


def remarks(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What does not fit into a cell."""
    for row in rows:
        what, busy = f"{row['workload']} {row['method']}", row["busy_elsewhere"]
        if busy is not None and busy > BUSY_CORES:
            yield f"{what}: unstable, {busy:.1f} cores were busy with other work"
        for name, entry in row["peers"].items():
            if entry.get("recorded_meanwhile"):
                yield f"{what}, {name}: unstable, calls were recorded within the rounds"
            if entry["why"]:
                said = "" if entry["status"] == "wrong" else f"{entry['status']}: "
                yield f"{what}, {name}: {said}{entry['why']}"


def _sorted(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return sorted(row["peers"].items(), key=lambda item: item[1]["status"] != "ok")


def _head(row: dict[str, Any]) -> dict[str, str]:
    return {
        "peer": f"[bold]{row['workload']} {row['method']}",
        "ms (quartiles)": f"T {row['tasks']}, K {row['steps']}",
        "times as fast": f"{row['rounds']} rounds",
        "x floor": f"{number(row['floors']['least_ms'])} ms",
        "gate": row["dtype"],
    }


def _peer(named: tuple[str, dict[str, Any]]) -> dict[str, str]:
    name, entry = named
    if entry["status"] not in TIMED:
        return {"peer": name, "gate": f"[yellow]{entry['status']}"}
    right = entry["status"] == "ok"
    time = f"{number(entry['median_ms'])} ({number(entry['q1_ms'])}-{number(entry['q3_ms'])})"
    if entry.get("replay_ms") is not None:
        time += f", replayed {number(entry['replay_ms'])}"
    return {
        "peer": name,
        "ms (quartiles)": time if right else f"[dim]{time}",
        "times as fast": ratio(entry),
        "x floor": number(entry["times_floor"]),
        "peak MiB": mebibytes(entry.get("peak_bytes")),
        "launches": count(entry.get("launches")),
        "compile s": number(entry["compile_s"]),
        "gate": f"{entry['gate']['worst']:.0e}" if right else "[red]wrong",
    }


def ratio(entry: dict[str, Any]) -> str:
    """The speed-up, or that there is none to quote."""
    found = entry.get("speedup")
    if found is None:
        return ""
    if found["unstable"]:
        return f"~{number(found['median'])} unstable"
    return f"{number(found['median'])} ({number(found['q1'])}-{number(found['q3'])})"


def number(value: float | None) -> str:
    """Three digits or, of small ones, two; no exponent."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 0.1 or value == 0:
        return f"{value:.{1 if value >= 10 else 2}f}"
    return f"{value:.2g}" if value >= 1e-4 else "<0.0001"


def mebibytes(size: float | None) -> str:
    """Memory, as exactly as it is known."""
    if size is None:
        return ""
    return f"{size / 2**20:,.0f}" if size >= 2**20 else "<1"


def count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
