"""Methods and backbones: who is adapted, from which weights, and the first loss of each."""

import pytest
import torch
from torch import nn

from fastkfo.training import METHODS
from fastkfo.training.backbones import features
from fastkfo.training.methods import build
from fastkfo.training.sources import load
from tests.training_cases import small


def first_loss(method, **options):
    options = {"dtype": "float64", "meta_batch": 4, "steps": 3, "fast_lr": 0.3} | options
    config = small("x", method=method, **options)
    problem = load(config, ("train",))
    built = build(config, problem.shape, problem.outputs, problem.regression)
    return built, built.train(*problem.tasks["train"].sample(4)).loss.mean().item()


def test_all_begin_where_maml_does():
    """At the start a transform is the identity: the same weights give the same loss."""
    maml = first_loss("maml")[1]
    for method in ("maml-kfo", "meta-sgd", "meta-curvature"):
        assert first_loss(method, adapt_transform=False)[1] == pytest.approx(maml, rel=1e-9)
    hidden = first_loss("maml-kfo", hidden_kfo_layers=2)[1]  # not adapted, by default
    assert hidden != maml
    assert hidden == pytest.approx(maml, rel=1e-3)
    assert first_loss("maml-kfo")[1] != pytest.approx(maml, rel=1e-6)  # adapted, by default
    assert first_loss("maml-linnet")[1] != pytest.approx(maml, rel=1e-3)
    anil = first_loss("anil")[1]
    assert anil != pytest.approx(maml, rel=1e-3)
    assert first_loss("anil-kfo", adapt_transform=False)[1] == pytest.approx(anil, rel=1e-9)


@pytest.mark.parametrize("method", list(METHODS))
def test_everything_gets_a_gradient(method):
    built, _ = first_loss(method, hidden_kfo_layers=1 if method.endswith("kfo") else 0)
    config = small("x", dtype="float64", meta_batch=4)
    tasks = load(config, ("train",)).tasks["train"]
    built.train(*tasks.sample(4)).loss.mean().backward()
    parameters = dict(built.train.named_parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
    assert (built.features is None) == (not method.startswith("anil"))
    assert len(list(built.learner.module.modules())) == (
        1 if method.startswith("anil") else 7 + 4 * (method == "maml-linnet")
    )


def test_the_seed_decides_and_nothing_else_moves():
    state = torch.get_rng_state()
    first = first_loss("maml")[0].learner.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    second = first_loss("maml")[0].learner.state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = first_loss("maml", seed=1)[0].learner.state_dict()
    assert not torch.equal(first["module.0.weight"], other["module.0.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "x"}, "method: expected one of maml, anil"),
        ({"method": "maml", "hidden_kfo_layers": 1}, "hidden_kfo_layers: expected 0"),
        ({"method": "anil", "adapt_transform": True}, "adapt_transform: expected False"),
        ({"backbone": "x-2x4"}, "backbone: expected one like mlp-40x40"),
        ({"backbone": "mean-2"}, "backbone: expected BLOCKSxCHANNELS"),
        ({"backbone": "mlp-0x4"}, "backbone: expected one like"),
        ({"backbone": "pool-4x4x4"}, "backbone: expected BLOCKSxCHANNELS"),
        ({"backbone": "pool-4x4"}, "backbone: expected one for inputs"),
    ],
    ids=str,
)
def test_what_does_not_go(options, message):
    with pytest.raises(ValueError, match=message):
        first_loss(**({"method": "maml"} | options))


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [
        ("mlp-7x9", (5,), 9),
        ("mlp-6", (1, 8, 8), 6),
        ("plain-2x16", (1, 8, 8), 64),
        ("strided-4x6", (1, 28, 28), 6),
        ("mean-2x8", (3, 32, 32), 8),
        ("pool-4x4", (3, 84, 84), 100),
    ],
)
def test_backbones(name, shape, size):
    network, p = features(name, shape)
    assert p == size
    assert network(torch.zeros(3, *shape)).shape == (3, size)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.training and m.num_batches_tracked == 1 for m in norms)
