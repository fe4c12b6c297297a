"""The examples: three ways to the same training, which differ in a handful of lines."""

import difflib
import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = ("loop", "batched", "inner_loop")


def load(name):
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, iterations):
    return load(name).main(iterations)


def test_they_train_alike(capsys):
    losses = [run(name, 4) for name in NAMES]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == pytest.approx(losses[0], rel=1e-3)
    assert run("inner_loop", 15) < 0.9 * run("inner_loop", 1)
    assert "query loss" in capsys.readouterr().out


def test_they_differ_in_a_handful_of_lines():
    texts = [(EXAMPLES / f"{name}.py").read_text().splitlines()[1:] for name in NAMES]
    for other in texts[1:]:
        changed = [
            line for line in difflib.ndiff(texts[0], other) if line[0] in "+-" and line[1:].strip()
        ]
        assert sum(line[0] == "+" for line in changed) <= 8
        assert len(other) <= 80
