"""The first lines of docs/tasks.md run as they are."""

import re
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called


def test_the_example_runs():
    text = (Path(__file__).resolve().parent.parent / "docs" / "tasks.md").read_text()
    found = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], found)
    gradients = [p.grad for p in found["model"].parameters()]
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients)
