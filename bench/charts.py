"""The pictures of records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.peers import NAMES
from bench.scaling import wrong

COLOURS = {name: f"C{k}" if k < 10 else "0.3" for k, name in enumerate(NAMES)}  # C10 is C0
DRAWN = ("ok", "wrong")


def peers(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds of every peer per problem, the floor as a line; hatched where wrong."""
    figure, axis = plt.subplots(figsize=(11, 3.8))
    names = [n for n in NAMES if any("ms" in row["peers"].get(n, {}) for row in rows)]
    width = 0.84 / len(names)
    for at, row in enumerate(rows):
        for k, name in enumerate(names):
            peer = row["peers"].get(name, {})
            if peer.get("status") not in DRAWN:
                continue
            wrong = peer["status"] == "wrong"
            x = at + (k - (len(names) - 1) / 2) * width
            axis.bar(
                x, peer["ms"], width * 0.92, color="white" if wrong else COLOURS[name],
                edgecolor=COLOURS[name], hatch="////" if wrong else None,
            )  # fmt: skip
        axis.hlines(row["floor_ms"], at - 0.42, at + 0.42, color="0.2", linestyle="--")
    axis.set_yscale("log")
    axis.set_ylabel("ms per meta-gradient")
    axis.set_xticks(
        range(len(rows)),
        [f"{row['method']}\n{row['workload']}" for row in rows],
        fontsize=8,
    )
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in names]
    wrong_too = plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="0.4", hatch="////")
    floor = plt.Line2D([0], [0], color="0.2", linestyle="--")
    axis.legend(
        [*handles, wrong_too, floor], [*names, "wrong", "floor"],
        frameon=False, fontsize=8, ncol=1, loc="center left", bbox_to_anchor=(1, 0.5),
    )  # fmt: skip
    _save(figure, axis, path)


def scaling(runs: list[dict[str, Any]], path: Path) -> None:
    """Time and memory over the axis, one row of panels per problem; a cross where a peer ends."""
    rows = [row for row in runs[-1]["rows"] if "axis" in row]
    figure, panels = plt.subplots(
        len(rows), 2, figsize=(9, 3.1 * len(rows)), squeeze=False, layout="constrained"
    )
    for row, (time, memory) in zip(rows, panels, strict=True):
        for name, peer in row["peers"].items():
            if not peer["points"]:
                continue
            x = [p["x"] for p in peer["points"]]
            is_wrong = wrong(peer) is not None
            style = "--" if is_wrong else "-"
            label = name + (" (wrong)" if is_wrong else "")
            look = {"color": COLOURS[name], "linestyle": style, "marker": ".", "label": label}
            time.plot(x, [p["median_ms"] for p in peer["points"]], **look)
            held = [max(p["peak_bytes"] or 0, 2**16) / 2**20 for p in peer["points"]]
            memory.plot(x, held, **look)
            if peer["stopped"]:
                time.plot(x[-1], peer["points"][-1]["median_ms"], "x", color=COLOURS[name], ms=9)
        ticks = sorted({p["x"] for peer in row["peers"].values() for p in peer["points"]})
        for panel, unit in ((time, "ms"), (memory, "MiB")):
            panel.set(xscale="log", yscale="log", xlabel=row["axis"], ylabel=unit)
            panel.set_xticks(ticks, [str(x) for x in ticks])
            panel.set_xticks([], minor=True)
            panel.set_title(f"{row['workload']} {row['method']}", fontsize=9)
            panel.spines[["top", "right"]].set_visible(False)
        time.legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _save(figure: Any, axis: Any, path: Path) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
