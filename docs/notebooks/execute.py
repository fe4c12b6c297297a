"""Runs tour.ipynb and keeps what comes out in it: `.venv/bin/python docs/notebooks/execute.py`.

Needs the extras docs and demo. tests/test_notebook.py says when it is due.
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

PATH = Path(__file__).resolve().parent / "tour.ipynb"


def main() -> None:
    """Execute the notebook, without times and versions, so that a second run changes nothing."""
    notebook = nbformat.read(PATH, as_version=4)
    NotebookClient(notebook, record_timing=False).execute()
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    nbformat.write(notebook, PATH)


if __name__ == "__main__":
    main()
