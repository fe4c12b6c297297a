"""docs/notebooks/tour.ipynb: its cells, run as a script, print and draw what is stored in it.

The pages show stored outputs (GitHub does, too), so they must be those of today's code. When one is
not, `.venv/bin/python docs/notebooks/execute.py` makes them anew.
"""

import json
import re
import warnings

import pytest

from tests.documents import ROOT

pytestmark = pytest.mark.slow  # what it prints of paths is that of the native library
PATH = ROOT / "docs" / "notebooks" / "tour.ipynb"
NUMBER = re.compile(r"-?\d+\.\d+")
LAST_DIGIT = 0.011  # of what is printed with two decimals: float64 differs less between machines


def stored():
    """The code cells: their text, what they printed, and how many pictures they drew."""
    for cell in json.loads(PATH.read_text())["cells"]:
        if cell["cell_type"] == "code":
            outputs = cell["outputs"]
            printed = "".join(t for o in outputs for t in o.get("text", ()))
            pictures = sum("image/png" in o.get("data", ()) for o in outputs)
            yield "".join(cell["source"]), printed, pictures


def test_its_cells_give_what_is_stored(capsys):
    pytest.importorskip("matplotlib").use("Agg")
    import torch
    from matplotlib import pyplot as plt

    warnings.filterwarnings("ignore", message=".*non-interactive")  # of plt.show()
    before = torch.get_default_dtype()
    found = {}
    try:
        for number, (text, printed, pictures) in enumerate(stored()):
            exec(compile(text, f"{PATH.name}, code cell {number}", "exec"), found)
            out = capsys.readouterr().out
            assert NUMBER.sub("x", out) == NUMBER.sub("x", printed)
            numbers, expected = (list(map(float, NUMBER.findall(t))) for t in (out, printed))
            assert numbers == pytest.approx(expected, abs=LAST_DIGIT)
            assert len(plt.get_fignums()) == pictures
            plt.close("all")
    finally:
        torch.set_default_dtype(before)
        plt.close("all")


def test_it_has_been_executed():
    cells = list(stored())
    assert sum(pictures for *_, pictures in cells) >= 3
    assert any(printed.startswith("tasks: ") for _, printed, _ in cells)
    assert not any("Traceback" in printed for _, printed, _ in cells)
