"""Runs `fastkfo reproduce` and keeps what docs/reproduce.md quotes.

    python -m bench.reproduce             # ten minutes of processor time

Record: `results/<machine>/reproduce/`, its figures `docs/images/reproduce-*.png`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench import machine
from bench.records import RESULTS
from fastkfo.cli.reproduce_report import FIGURES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    environment = machine.environment("cpu")
    folder = RESULTS / environment["machine"] / "reproduce"
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        words = ["reproduce", "--out", name, "--processes", str(given.processes)]
        subprocess.run([sys.executable, "-m", "fastkfo.cli", *words], check=True)
        content = json.loads((out / "results.json").read_text())
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"environment": environment} | content)
        # A line per run: readable, and half as long as with a line per number.
        (folder / "results.json").write_text(text.replace('{"problem"', '\n{"problem"') + "\n")
        for table in ("table.csv", "table.md"):
            shutil.copy(out / table, folder / table)
        for figure in FIGURES:
            shutil.copy(out / figure, machine.ROOT / "docs" / "images" / figure)


if __name__ == "__main__":
    main()
