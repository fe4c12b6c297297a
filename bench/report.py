"""Makes the README's table, every record's own page and all charts, from stored records alone.

    python bench/report.py

Records are `bench/results/<machine>/<name>.json`. The README's table is of the machine and the
record named below; every machine's folder gets a README.md with all that its records hold.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import charts, summary
from bench.records import RESULTS, load
from bench.table import number

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
QUOTED = "readme"  # the record of what the README quotes: three runs
BEGIN, END = "<!-- table: bench/report.py -->", "<!-- end of table -->"
TITLES = {"jax": "JAX `jit(vmap)`", "vmap": "`torch.func.vmap`", "compile": "`torch.compile(vmap)`"}


def main() -> None:
    """Rewrite what is made from records."""
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        pages = {path.stem: load(path) for path in sorted(folder.glob("*.json"))}
        (folder / "README.md").write_text(page(folder.name, pages))
        for name, runs in pages.items():
            if any("axis" in row for run in runs for row in run["rows"]):
                charts.scaling(runs, IMAGES / f"{name}-{folder.name}.png")
        if QUOTED in pages:
            readme(pages[QUOTED])
            charts.peers(summary.merged(pages[QUOTED]), IMAGES / "peers.png")


def readme(runs: list[dict[str, Any]]) -> None:
    """Put the quoted table between its marks."""
    path = ROOT / "README.md"
    before, rest = path.read_text().split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{quoted(runs)}\n{END}{after}")


def quoted(runs: list[dict[str, Any]]) -> str:
    """One row per problem, one column per peer: milliseconds, and times as fast as learn2learn."""
    rows = summary.merged(runs)
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    head = ["workload", "method", *(TITLES.get(name, name) for name in names), "floor"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        cells = [_cell(row["peers"].get(name)) for name in names]
        size = f"`{row['workload']}`, T {row['tasks']}, K {row['steps']}"
        lines.append(_line([size, row["method"], *cells, f"{number(row['floor_ms'])} ms"]))
    return "\n".join([*lines, "", _made_with(runs)])


def _cell(peer: dict[str, Any] | None) -> str:
    if peer is None:
        return ""
    if "ms" not in peer:
        return str(peer["status"])
    time = f"{number(peer['ms'])} ms"
    if peer["status"] == "wrong":
        return f"wrong by {peer['wrong_by']:.0e} ({time})"
    if "speedup" not in peer or peer["speedup"] == peer["lowest"] == peer["highest"] == 1:
        return time
    return f"{time}, **{_times(peer)}**"


def _times(peer: dict[str, Any]) -> str:
    """`2.1x (2.0-2.2)`: the median run, and the lowest and the highest."""
    if peer["unstable"]:
        return f"about {peer['speedup']:.2g}x, unstable"
    digits = 0 if peer["speedup"] >= 10 else 2
    low, middle, high = (f"{peer[k]:.{digits}f}" for k in ("lowest", "speedup", "highest"))
    return f"{middle}x ({low}-{high})"


def page(machine: str, records: dict[str, list[dict[str, Any]]]) -> str:
    """All that a machine's records hold."""
    parts = [f"# Records of {machine}", "Made by `bench/report.py` from the JSON files beside it."]
    for name, runs in records.items():
        parts.append(f"## {name}\n\n{_made_with(runs)}")
        if rows := summary.merged(runs):
            parts.append(_full(rows))
        sweeps = [row for run in runs for row in run["rows"] if "axis" in row]
        if sweeps:
            parts.append(_sweeps(sweeps))
    return "\n\n".join(parts) + "\n"


def _full(rows: list[dict[str, Any]]) -> str:
    head = ["workload", "method", "peer", "ms", "times as fast", "x floor", "peak MiB", "launches",
            "compile s", "gate"]  # fmt: skip
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        for name, peer in row["peers"].items():
            size = f"`{row['workload']}` T {row['tasks']} K {row['steps']}"
            lines.append(_line([size, row["method"], name, *_readings(peer)]))
    return "\n".join(lines)


def _readings(peer: dict[str, Any]) -> list[str]:
    if "ms" not in peer:
        return ["", "", "", "", "", "", f"{peer['status']}: {peer['why']}"]
    peak, launches, compile_s = (peer[k] for k in ("peak_bytes", "launches", "compile_s"))
    return [
        number(peer["ms"]),
        _times(peer) if "speedup" in peer else "",
        number(peer["times_floor"]),
        "" if peak is None else f"{peak / 2**20:.0f}",
        "" if launches is None else f"{launches:.0f}",
        "" if compile_s is None else number(compile_s),
        f"{peer['gate']:.0e}" if peer["status"] == "ok" else str(peer["why"]),
    ]


def _sweeps(rows: list[dict[str, Any]]) -> str:
    head = ["workload", "method", "peer", "x: ms (MiB)", "slope", "ends"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        for name, peer in row["peers"].items():
            points = ", ".join(
                f"{p['x']}: {number(p['median_ms'])} ({(p['peak_bytes'] or 0) / 2**20:.0f})"
                for p in peer["points"]
            )
            power = "" if peer["slope"] is None else f"{peer['slope']:.2f}"
            cells = [f"`{row['workload']}`, {row['axis']}", row["method"], name, points, power]
            wrong = f"{peer['why']}; " if peer["status"] == "wrong" else ""
            lines.append(_line([*cells, wrong + (peer["stopped"] or "")]))
    return "\n".join(lines)


def _made_with(runs: list[dict[str, Any]]) -> str:
    """Machine, versions, commit and ceilings, in a sentence."""
    e, c = runs[-1]["environment"], runs[-1]["ceilings"]
    versions = ", ".join(f"{k} {v}" for k, v in e["versions"].items() if k in ("torch", "jax"))
    gemm = c["gemm"]["float32"]
    return (
        f"float32 on {e['gpu'] or e['cpu']}, {e['threads']} threads; {len(runs)} run(s), medians; "
        "in brackets the slowest and the fastest run's ratio. Ceilings "
        f"{number(gemm['gflops'])} GFLOP/s ({gemm['best']}), "
        f"{number(c['copy']['gb_per_s'])} GB/s. Python {e['python']}, {versions}, "
        f"commit {e['commit']}, {e['date']}."
    )


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
