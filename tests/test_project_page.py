"""The snippet of Meta-KFO's project page, with the import changed and nothing else.

The page (https://seba1511.net/projects/kfo) leaves the model and the loss to its reader; the loop
around its lines is written as learn2learn's documentation has it.
"""

import pytest
import torch

from tests.oracle import learn2learn

SNIPPET = """
import torch
import {library} as l2l

model = MyModel()
metaopt = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)
gbml = l2l.algorithms.GBML(
    module=model,
    transform=metaopt,
    lr=0.01,
)
opt = torch.optim.SGD(gbml.parameters(), lr=0.001)

for iteration in range(10):
    opt.zero_grad()
    task_model = gbml.clone()
    loss = compute_loss(task_model)
    task_model.adapt(loss)
    loss = compute_loss(task_model)
    loss.backward()
    opt.step()
"""


class MyModel(torch.nn.Sequential):
    """Convolution, norm and a linear head."""

    def __init__(self):
        super().__init__(
            torch.nn.Conv2d(1, 4, 3, bias=False),
            torch.nn.BatchNorm2d(4),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(4 * 36, 3),
        )


def run(library):
    """What the snippet leaves: the loss of the last iteration, and everything learned."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 1, 8, 8, generator=generator)
    y = torch.arange(12) % 3

    def compute_loss(model):
        return torch.nn.functional.cross_entropy(model(x), y)

    torch.manual_seed(0)
    names = {"MyModel": MyModel, "compute_loss": compute_loss}
    exec(compile(SNIPPET.format(library=library), "project page", "exec"), names)
    return names["loss"].item(), names["gbml"].state_dict()


def test_it_runs_and_learns():
    loss, learned = run("fastkfo")
    torch.manual_seed(0)
    before = MyModel().state_dict()
    assert loss == loss
    changed = [k for k, v in before.items() if not torch.equal(v, learned[f"module.{k}"])]
    assert len(changed) == len(before), "something was not trained"
    factors = [v for k, v in learned.items() if k.endswith(("left", "right")) and v.shape[0] > 1]
    assert factors
    assert not any(torch.equal(v, torch.eye(len(v))) for v in factors)


def test_it_is_what_learn2learn_makes_of_it():
    learn2learn()
    (ours, learned), (theirs, expected) = run("fastkfo"), run("learn2learn")
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert learned.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(learned[key], value, rtol=1e-4, atol=1e-6)
