"""fastkfo.utils: names, small helpers and distributions, against learn2learn's own."""

import argparse
import dataclasses
import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import AffineTransform, Independent, Normal, TransformedDistribution

from fastkfo import utils
from tests.oracle import learn2learn
from tests.utils_models import (
    MODELS,
    assert_all_equal,
    cnn,
    data,
    mlp,
)

l2l = learn2learn()


@pytest.fixture(params=list(MODELS))
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().double()


# ------------------------------------------------------------------------------ names, small ones


@pytest.mark.parametrize(
    "name",
    [
        "magic_box",
        "clone_parameters",
        "clone_named_parameters",
        "clone_module",
        "detach_module",
        "update_module",
        "clone_distribution",
        "detach_distribution",
        "accuracy",
        "flatten_config",
    ],
)
def test_signatures_are_learn2learns(name):
    ours = inspect.signature(getattr(utils, name)).parameters.values()
    theirs = inspect.signature(getattr(l2l.utils, name)).parameters.values()
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def test_magic_box():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y = utils.magic_box(x)
    assert_all_equal([y], [torch.ones_like(x)])
    for _ in range(3):  # every derivative is 1 again
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert_all_equal([y], [torch.ones_like(x)])
    assert_all_equal([utils.magic_box(x)], [l2l.utils.magic_box(x)])
    assert utils.magic_box("x") == "x"


def test_clone_parameters():
    params = list(mlp().parameters())
    clones = utils.clone_parameters(params)
    assert_all_equal(clones, params)
    assert all(c.grad_fn is not None for c in clones)
    named = utils.clone_named_parameters(dict(mlp().named_parameters()))
    assert list(named) == ["0.weight", "0.bias", "2.weight"]
    assert all(c.grad_fn is not None for c in named.values())


def test_accuracy():
    preds, targets = torch.randn(7, 3), torch.randint(3, (7,))
    for t in (targets, targets.double()):
        result = utils.accuracy(preds, t)
        assert result == l2l.utils.accuracy(preds, t)
        assert result.dtype == torch.float32


@dataclasses.dataclass
class Inner:
    lr: float = 0.1
    sizes: tuple = (1, 2)


@dataclasses.dataclass
class Outer:
    name: str = "kfo"
    inner: Inner = dataclasses.field(default_factory=Inner)
    extra: dict = dataclasses.field(default_factory=lambda: {"seed": 3})


def test_flatten_config():
    flat = {"name": "kfo", "inner.lr": 0.1, "inner.sizes": (1, 2), "extra.seed": 3}
    assert utils.flatten_config(Outer()) == flat
    assert utils.flatten_config(argparse.Namespace(**vars(Outer()))) == flat
    nested = {"run": argparse.Namespace(config=Outer()), "empty": {}, "none": None}
    expected = {f"run.config.{k}": v for k, v in flat.items()}
    assert utils.flatten_config(nested) == {**expected, "none": None}
    assert utils.flatten_config({"a": 1}, prefix="p") == {"p.a": 1}
    assert utils.flatten_config({"cls": Inner}) == {"cls": Inner}


def test_flatten_config_errors():
    with pytest.raises(TypeError, match=r"args: expected a dict.* got int"):
        utils.flatten_config(3)
    with pytest.raises(TypeError, match=r"args: expected string keys, got 1 \(int\)"):
        utils.flatten_config({"a": {1: 2}})
    with pytest.raises(ValueError, match=r"args: expected distinct dotted keys, got \['a\.b'\]"):
        utils.flatten_config({"a": {"b": 1}, "a.b": 2})


def test_warn_once():
    warn = type(utils.warn_once)()
    with pytest.warns(UserWarning, match="one"):
        warn("one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn("one")
    with pytest.warns(DeprecationWarning, match="two"):
        warn("two", severity="deprecation")
    with pytest.warns(FutureWarning, match="three"):
        warn("three", FutureWarning)
    with pytest.raises(RuntimeError, match="four"):
        warn("four", severity="error")
    with pytest.raises(ValueError, match=r"severity: expected one of .* got 'loud'"):
        warn("five", severity="loud")


# ----------------------------------------------------------------------------------- distributions


def test_clone_distribution_matches_learn2learn():
    loc = torch.zeros(3, requires_grad=True)
    dist = Normal(loc, torch.ones(3))
    x = torch.ones(3)
    for module in (utils, l2l.utils):
        clone = module.clone_distribution(dist)
        assert type(clone) is Normal
        assert clone.loc is not dist.loc
        assert clone.scale is not dist.scale
        (g,) = torch.autograd.grad(clone.log_prob(x).sum(), loc)
        assert_all_equal([g], [x])


def test_clone_nested_distribution_inside_a_graph():
    loc = torch.zeros(3, requires_grad=True)
    shift = torch.ones(3, requires_grad=True)
    base = Independent(Normal(loc * 2, torch.ones(3)), 1)
    dist = TransformedDistribution(base, [AffineTransform(shift * 3, 1.0)])
    dist.net = nn.Linear(3, 3)
    clone = utils.clone_distribution(dist)
    x = torch.randn(3)
    grads = torch.autograd.grad(clone.log_prob(x), (loc, shift), retain_graph=True)
    assert_all_equal(grads, torch.autograd.grad(dist.log_prob(x), (loc, shift)))
    assert clone.net is not dist.net
    assert clone.net.weight.grad_fn is not None
    assert clone.base_dist.base_dist.loc is not dist.base_dist.base_dist.loc


def test_detach_distribution():
    loc = torch.zeros(3, requires_grad=True)
    dist = Independent(Normal(loc, torch.ones(3)), 1)
    dist.net = utils.clone_module(net := nn.Linear(3, 3))
    assert utils.detach_distribution(dist) is dist
    assert not dist.log_prob(torch.ones(3)).requires_grad
    assert isinstance(dist.net, nn.Linear)  # learn2learn leaves None here
    assert not dist.net.weight.requires_grad
    assert net.weight.requires_grad
    assert loc.requires_grad
    flow = TransformedDistribution(Normal(loc, 1.0), [AffineTransform(loc * 2, 1.0)])
    assert not utils.detach_distribution(flow).log_prob(torch.ones(3)).requires_grad


def test_maml_like_loop_matches_learn2learn_on_a_classifier():
    """Three tasks, three steps, one accumulated meta-gradient: bit for bit."""
    results = []
    for module in (utils, l2l.utils):
        torch.manual_seed(0)
        model = cnn().double()
        for task in range(3):
            x = data() + task
            y = torch.arange(6) % 4
            clone = module.clone_module(model)
            for _ in range(3):
                loss = F.cross_entropy(clone(x), y)
                grads = torch.autograd.grad(loss, list(clone.parameters()), create_graph=True)
                module.update_module(clone, [-0.5 * g for g in grads])
            F.cross_entropy(clone(x), y).backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert_all_equal(*results)
