"""Where readings are kept: one JSON file per selection and machine, whole after every row."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


class Record:
    """A file of runs, each with its environment and its rows.

    Args:
        path: the file; one that is there is replaced when the first row is in.

    Raises:
        ValueError: Nothing can be written there. Said before anything is measured.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._runs: list[dict[str, Any]] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise ValueError(
                f"results: expected a folder that can be written, got {path.parent}: "
                f"{error.strerror}"
            ) from error

    def begin(self, **about: Any) -> None:
        """A new run."""
        self._runs.append({**about, "complete": False, "rows": []})

    def add(self, row: dict[str, Any]) -> None:
        """A finished row, on disk when this returns."""
        self._runs[-1]["rows"].append(row)
        self._write()

    def replace(self, row: dict[str, Any]) -> None:
        """The last row has grown."""
        self._runs[-1]["rows"][-1] = row
        self._write()

    @property
    def rows(self) -> int:
        """How many are on disk."""
        return sum(len(run["rows"]) for run in self._runs)

    def end(self) -> None:
        """The run has all its rows."""
        self._runs[-1]["complete"] = True
        self._write()

    def _write(self) -> None:
        # Beside it and then moved: whoever interrupts finds the old file or the new one, whole.
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text(json.dumps({"format": 1, "runs": self._runs}, indent=1) + "\n")
        os.replace(partial, self.path)


def write_rows(folder: str, name: str, environment: dict[str, Any], rows: Any) -> None:
    """Rows alone, with the machine, the versions and the commit, in a folder of the machine's."""
    path = RESULTS / environment["machine"] / folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


def load(path: Path) -> list[dict[str, Any]]:
    """The runs of a record.

    Raises:
        ValueError: It is not a record of this format.
    """
    record = json.loads(path.read_text())
    if not isinstance(record, dict) or record.get("format") != 1:
        raise ValueError(f"{path}: expected a record of format 1")
    runs: list[dict[str, Any]] = record["runs"]
    return runs
