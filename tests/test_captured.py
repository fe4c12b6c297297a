"""`fastkfo.capture`: a function of one's own as a graph, by a stand-in that runs on a CPU."""

import pytest
import torch

import fastkfo
from fastkfo.inner_loop import recorder
from fastkfo.inner_loop.captured import Captured
from tests.graphs_on_cpu import Graph


def test_a_step_of_ones_own():
    weight = torch.ones(4, requires_grad=True)
    calls = []

    def step(x):
        calls.append(1)
        return {"y": (x * weight).sum(), "x": [x + 1]}

    kinds = [(torch.Size([4]), torch.float32, torch.device("cpu"))]
    replay = Captured(step, kinds, Graph)
    found = [replay(torch.full((4,), float(k))) for k in range(5)]
    assert [x["y"].item() for x in found] == [0, 4, 8, 12, 16]
    assert found[3]["x"][0].tolist() == [4.0] * 4
    with pytest.raises(
        ValueError, match=r"tensors: expected \[4\] torch.float32 on cpu, got \[5\]"
    ):
        replay(torch.ones(5))


def test_inputs_of_a_step_are_checked(monkeypatch):
    monkeypatch.setattr(recorder, "DEVICE", "cuda")
    with pytest.raises(TypeError, match="step: expected a function, got int"):
        fastkfo.capture(3, [torch.ones(1)])
    with pytest.raises(TypeError, match="example: expected tensors, got int"):
        fastkfo.capture(print, [3])
    with pytest.raises(ValueError, match="example: expected tensors on one CUDA device, got cpu"):
        fastkfo.capture(print, [torch.ones(1)])
    with pytest.raises(ValueError, match="got no tensor"):
        fastkfo.capture(print, [])
