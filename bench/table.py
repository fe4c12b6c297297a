"""Rows as a table in the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

COLUMNS = (
    "peer", "ms (quartiles)", "times as fast", "x floor", "peak MiB", "launches", "compile s",
    "gate",
)  # fmt: skip
TIMED = ("ok", "wrong")


def problems(rows: list[dict[str, Any]]) -> Table:
    """All rows of a run, one section per problem; whoever failed the gate stands below."""
    table = Table(*COLUMNS, title="one meta-gradient", title_style="bold")
    for column in table.columns[1:-1]:
        column.justify = "right"
    for row in rows:
        floor = row["floors"]["least_ms"]
        head = f"[bold]{row['workload']}[/] {row['method']}, T {row['tasks']}, K {row['steps']}"
        table.add_section()
        table.add_row(head, f"{number(floor)}", "", "floor", "", "", "", row["dtype"])
        peers = sorted(row["peers"].items(), key=lambda item: item[1]["status"] != "ok")
        for name, entry in peers:
            table.add_row(*_cells(name, entry))
    return table


def _cells(name: str, entry: dict[str, Any]) -> tuple[str, ...]:
    if entry["status"] not in TIMED:
        return name, "", "", "", "", "", "", f"[yellow]{entry['status']}: {entry['why']}"
    time = f"{number(entry['median_ms'])} ({number(entry['q1_ms'])}-{number(entry['q3_ms'])})"
    peak, compile_s = entry["peak_bytes"], entry["compile_s"]
    return (
        name,
        time if entry["status"] == "ok" else f"[dim]{time}",
        ratio(entry),
        number(entry["times_floor"]),
        "" if peak is None else f"{peak / 2**20:.0f}",
        "" if entry["launches"] is None else str(entry["launches"]),
        "" if compile_s is None else number(compile_s),
        f"{entry['gate']['worst']:.0e}" if entry["status"] == "ok" else f"[red]{entry['why']}",
    )


def ratio(entry: dict[str, Any]) -> str:
    """The speed-up, or that there is none to quote."""
    found = entry.get("speedup")
    if found is None:
        return ""
    if found["unstable"]:
        return f"~{found['median']:.2g} unstable"
    return f"{found['median']:.2f} ({found['q1']:.2f}-{found['q3']:.2f})"


def number(value: float) -> str:
    """Three digits, no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 if value < 10 else 1}f}"
