"""Makes the README's table, every record's own page and all charts, from stored records alone.

    python bench/report.py

Records are `bench/results/<machine>/<name>.json`. The README's table is of `readme.json`, which
`fastkfo bench --readme --runs 3` makes; every machine's folder gets a README.md with all that its
records hold.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import charts, scaling, summary
from bench.peers import ORACLE
from bench.records import RESULTS, load
from bench.selection import README
from bench.table import count, mebibytes, number
from bench.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
BEGIN, END = "<!-- table: bench/report.py -->", "<!-- end of table -->"
SCRATCH = ("quick", "last")  # not committed
ABOUT = """\
Made by `bench/report.py` from the JSON files beside it. Float32 but where said. Times are medians
of runs, ratios are to learn2learn, with the slowest and the fastest run's in brackets. Launches are
operators dispatched on the CPU, kernels on CUDA, and for JAX the instructions of its program. "off"
is the distance from learn2learn's float64 gradient in the precision that was timed, "gate" that of
the float64 gradient, of the worst parameter. The loops in Python (learn2learn, fastkfo, reference)
and fastkfo's batched paths (batched, inner_loop) keep batch norm's running statistics, vmap and JAX
have none."""
TITLES = {
    "fastkfo": "fastkfo, the loop",
    "inner_loop": "fastkfo `InnerLoop`",
    "jax": "JAX `jit(vmap)`",
    "vmap": "`torch.func.vmap`",
    "compile": "`torch.compile(vmap)`",
}
OURS = ("fastkfo", "inner_loop", "inner_loop_adjoint")
KERNELS = ("native", "triton", "reference", "BLAS")


def main() -> None:
    """Rewrite what is made from records."""
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        files = [path for path in sorted(folder.glob("*.json")) if path.stem not in SCRATCH]
        pages = {path.stem: load(path) for path in files}
        write(folder / "README.md", page(folder.name, pages))
        for name, runs in pages.items():
            if any("axis" in row for run in runs for row in run["rows"]):
                charts.scaling(runs, IMAGES / f"{name}-{folder.name}.png")
        if README in pages:
            readme(pages[README])
            charts.peers(summary.merged(pages[README]), IMAGES / "peers.png")


def write(path: Path, text: str) -> None:
    """Replace a file, and say so."""
    path.write_text(text)
    print(path.relative_to(ROOT))


def readme(runs: list[dict[str, Any]]) -> None:
    """Put the quoted table between its marks."""
    path = ROOT / "README.md"
    before, rest = path.read_text().split(BEGIN)
    after = rest.split(END)[1]
    write(path, f"{before}{BEGIN}\n{quoted(runs)}\n{END}{after}")


def quoted(runs: list[dict[str, Any]]) -> str:
    """One row per problem, one column per peer: milliseconds, and times as fast as learn2learn."""
    rows = summary.merged(runs)
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    head = ["workload", "method", *(TITLES.get(name, name) for name in names), "floor"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        peers = [_cell(name, row["peers"].get(name)) for name in names]
        lines.append(_line([*_what(row), *peers, f"{number(row['floor_ms'])} ms"]))
    return "\n".join([*lines, "", made_with(runs)])


def _what(row: dict[str, Any]) -> list[str]:
    """Workload and method, with whatever is not the workload's own size."""
    own = WORKLOADS[row["workload"]]
    sizes = f"T {row['tasks']}, K {row['steps']}"
    width = "" if row["width"] == own.width else f", width {row['width']}"
    dtype = "" if row["dtype"] == "float32" else f", {row['dtype']}"
    return [f"`{row['workload']}` {sizes}{width}{dtype}", row["method"]]


def _cell(name: str, peer: dict[str, Any] | None) -> str:
    if peer is None:
        return ""
    if "ms" not in peer:
        return str(peer["status"])
    time = f"{number(peer['ms'])} ms"
    if peer["status"] == "wrong":
        return f"wrong by {number(100 * peer['wrong_by'])} % ({time})"
    if name == ORACLE or "speedup" not in peer:
        return time
    return f"{time}, **{_times(peer)}**" if name in OURS else f"{time}, {_times(peer)}"


def _times(peer: dict[str, Any]) -> str:
    """`2.10x (2.05-2.20)`: the median run, and the lowest and the highest."""
    low, middle, high = (number(peer[k]) for k in ("lowest", "speedup", "highest"))
    spread = f"{low}-{high}" if peer["runs"] > 1 else "one run"
    return f"~{middle}x ({spread}, unstable)" if peer["unstable"] else f"{middle}x ({spread})"


def page(machine: str, records: dict[str, list[dict[str, Any]]]) -> str:
    """All that a machine's records hold."""
    parts = [f"# Records of {machine}", ABOUT]
    for name, runs in records.items():
        cut = "" if all(run["complete"] for run in runs) else " (cut short)"
        parts.append(f"## {name}{cut}\n\n{made_with(runs)}")
        if rows := summary.merged(runs):
            parts.append(_full(rows))
        sweeps = [row for run in runs for row in run["rows"] if "axis" in row]
        if sweeps:
            parts.append(f"![{name}](../../../docs/images/{name}-{machine}.png)")
            parts.append(_sweeps(sweeps))
        rows = [row for run in runs for row in run["rows"]]
        for kind, table in (("op", _kernels), ("launched", _launches)):
            if found := [row for row in rows if kind in row]:
                parts.append(table(found))
    return "\n\n".join(parts) + "\n"


def _full(rows: list[dict[str, Any]]) -> str:
    head = ["workload", "method", "peer", "ms", "times as fast", "x floor", "peak MiB", "launches",
            "compile s", "off", "gate"]  # fmt: skip
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        for name, peer in row["peers"].items():
            lines.append(_line([*_what(row), name, *_readings(peer)]))
    return "\n".join(lines)


def _readings(peer: dict[str, Any]) -> list[str]:
    if "ms" not in peer:
        return ["", "", "", "", "", "", "", f"{peer['status']}: {peer['why']}"]
    replayed = "" if peer["replay_ms"] is None else f", replayed {number(peer['replay_ms'])}"
    return [
        number(peer["ms"]) + replayed,
        _times(peer) if "speedup" in peer else "",
        number(peer["times_floor"]),
        mebibytes(peer["peak_bytes"]),
        count(peer["launches"]),
        number(peer["compile_s"]),
        f"{peer['difference']:.0e}",
        f"{peer['gate']:.0e}" if peer["status"] == "ok" else str(peer["why"]),
    ]


def _sweeps(rows: list[dict[str, Any]]) -> str:
    head = ["workload", "method", "peer", "x: ms (MiB)", "slope", "ends"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        for name, peer in row["peers"].items():
            what = [f"`{row['workload']}`, {row['axis']}", row["method"], name]
            lines.append(_line([*what, *scaling.cells(peer)]))
    return "\n".join(lines)


def _kernels(rows: list[dict[str, Any]]) -> str:
    """Microseconds of each implementation, and how many times the floor that is."""
    head = ["op", "operands", "part", "floor, us", *(f"{name}, us (x floor)" for name in KERNELS)]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        entries = [row["implementations"].get(name) for name in KERNELS]
        what = [f"`{row['op']}`", row["case"], row["part"], number(row["floor_us"])]
        lines.append(_line([*what, *map(_kernel, entries)]))
    return "\n".join(lines)


def _kernel(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    if "us" not in entry:
        return str(entry["status"])
    how = "" if entry["how"] in ("graph", "wall") else f", by {entry['how']}"
    return f"{number(entry['us'])} ({number(entry['times_floor'])}{how})"


def _launches(rows: list[dict[str, Any]]) -> str:
    """Operations of one meta-gradient, and what a graph's node takes."""
    head = ["workload", "method", "eager: operations, ms", "replaying: operations, ms",
            "graph: nodes, ms", "us per node", "ms in kernels"]  # fmt: skip
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        cells = [row["why"] or ""] + [""] * 4
        if row["launched"]:
            pairs = [row["launched"][name] for name in ("eager", "replaying")]
            cells[:2] = [f"{count(p['operations'])}, {number(p['median_ms'])}" for p in pairs]
        if graph := row["graph"]:
            cells[2] = f"{count(graph['nodes'])}, {number(graph['ms'])}"
            cells[3:] = [number(graph["us_per_node"]), number(graph["busy_ms"])]
        lines.append(_line([*_what(row), *cells]))
    return "\n".join(lines)


def made_with(runs: list[dict[str, Any]]) -> str:
    """Machine, versions, commit and ceilings, in a sentence."""
    e = runs[-1]["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in e["versions"].items() if k in ("torch", "jax"))
    commits = ", ".join(dict.fromkeys(run["environment"]["commit"] for run in runs))
    many = f"{len(runs)} runs" if len(runs) > 1 else "One run"
    return (
        f"{many} on {e['gpu'] or e['cpu']}, {e['threads']} threads.{_ceilings(runs[-1])} "
        f"Python {e['python']}, {versions}, commit {commits}, {e['date']}."
    )


def _ceilings(run: dict[str, Any]) -> str:
    if "ceilings" not in run:
        return ""
    gemm, copy = run["ceilings"]["gemm"]["float32"], run["ceilings"]["copy"]
    return (
        f" Ceilings of the last: {number(gemm['gflops'])} GFLOP/s in float32 ({gemm['best']}), "
        f"{number(copy['gb_per_s'])} GB/s."
    )


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
