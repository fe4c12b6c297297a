"""Makes the README's table and picture from the stored records, and from nothing else.

python bench/report.py [RECORD]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- table: bench/report.py -->", "<!-- end of table -->"


def table(record: dict, memory: dict) -> str:
    """The rows of a record of bench/loop.py as Markdown."""
    peaks = {(row["workload"], row["method"]): row["peak_mib"] for row in memory["rows"]}
    lines = [
        "| workload | method | learn2learn | fastkfo | times as fast (quartiles) | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        if "refused" in row:
            lines.append(
                f"| {row['workload']} | {row['method']} | wrong by {row['difference']:.0e} |||"
            )
            continue
        theirs, ours = row["times"]["learn2learn"], row["times"]["fastkfo"]
        ratio = f"**{ours['speedup']:.2f}** ({ours['speedup_q1']:.2f} to {ours['speedup_q3']:.2f})"
        peak = peaks.get((row["workload"], row["method"]))
        held = f"{peak['fastkfo']:.0f} / {peak['learn2learn']:.0f} MiB" if peak else ""
        lines.append(
            f"| `{row['workload']}` | {row['method']} | {theirs['median_ms']:.1f} ms "
            f"| {ours['median_ms']:.1f} ms | {ratio} | {held} |"
        )
    e = record["environment"]
    lines += [
        "",
        f"One meta-gradient, 5 inner steps, float32, {e['threads']} threads of {e['cpu']}, "
        f"Python {e['python']}, torch {e['torch']}, commit {e['commit']}, {e['date']}.",
    ]
    return "\n".join(lines)


def picture(record: dict, path: Path) -> None:
    """Bars of the speed-ups, with quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in record["rows"] if "times" in row]
    names = list(dict.fromkeys(row["workload"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axis = plt.subplots(figsize=(8, 3.2))
    width = 0.8 / len(methods)
    for k, method in enumerate(methods):
        for row in (r for r in rows if r["method"] == method):
            ours = row["times"]["fastkfo"]
            at = names.index(row["workload"]) + (k - (len(methods) - 1) / 2) * width
            error = [[ours["speedup"] - ours["speedup_q1"]], [ours["speedup_q3"] - ours["speedup"]]]
            first = row["workload"] == names[0]
            axis.bar(
                at, ours["speedup"], width * 0.92, color=f"C{k}", label=method if first else None
            )
            axis.errorbar(at, ours["speedup"], yerr=error, color="0.3", capsize=2, linewidth=1)
            axis.text(
                at, ours["speedup_q3"] + 0.05, f"{ours['speedup']:.1f}", ha="center", fontsize=8
            )
    axis.axhline(1, color="0.4", linewidth=1, linestyle="--")
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("times learn2learn's speed")
    axis.set_title("The unchanged learn2learn loop on fastkfo", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncol=len(methods), fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def main() -> None:
    """Rewrite the README's table and the picture beside it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "loop"
    record = json.loads((RESULTS / f"{name}.json").read_text())
    memory = json.loads((RESULTS / "memory.json").read_text())
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{table(record, memory)}\n{END}{after}")
    picture(record, ROOT / "docs" / "images" / "loop.png")


if __name__ == "__main__":
    main()
