"""The code of docs/inner_optimizers.md runs as it is."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F

import fastkfo

TEXT = (Path(__file__).parents[1] / "docs" / "inner_optimizers.md").read_text(encoding="utf-8")


def test_the_code():
    known = {"__name__": __name__}
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(code, known)
    learner = known["learner"]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.parameters())
    assert known["inner_loop"].memory == "adjoint"
    lion = fastkfo.algorithms.MAML(torch.nn.Linear(4, 3), 0.1, inner_optimizer=known["Lion"]())
    x, y = known["x"], known["y"]
    out = fastkfo.InnerLoop(lion, F.cross_entropy, 3)(x[0], y[0], x[1], y[1])
    clone = lion.clone()
    for _ in range(3):
        clone.adapt(F.cross_entropy(clone(x[0, 0]), y[0, 0]))
    torch.testing.assert_close(out.loss[0], F.cross_entropy(clone(x[1, 0]), y[1, 0]))
