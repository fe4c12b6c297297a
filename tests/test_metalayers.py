"""fastkfo.nn.metalayers against learn2learn's own, and where learn2learn fails."""

import copy

import pytest
import torch
from torch import nn

import fastkfo.nn as knn
from fastkfo import utils
from fastkfo.nn import metalayers
from tests.oracle import learn2learn

l2l = learn2learn()


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def scale(value=0.5):
    return lambda param: knn.Scale(alpha=value).double()


def lora(module):
    """Wrap every Linear so that its parameters are scaled."""
    return {nn.Linear: lambda linear: module.ParameterTransform(linear, scale())}


def assert_all_equal(got, expected):
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=0)


# ------------------------------------------------------------------------------------- MetaModule


@pytest.mark.parametrize("freeze_module", [True, False])
def test_meta_module_matches_learn2learn(freeze_module):
    x = torch.randn(5, 3, dtype=torch.float64)
    results = []
    for module in (metalayers, l2l.nn.metalayers):
        model = module.MetaModule(two_layers(), lora(module), freeze_module=freeze_module)
        meta = list(model.meta_parameters())
        grads = torch.autograd.grad(model(x).pow(2).sum(), meta)
        names = [(n, p.requires_grad) for n, p in model.named_parameters()]
        results.append(([model(x), *meta, *grads], names, list(model.state_dict())))
        assert model.freeze_module is freeze_module
    (got, *rest), (expected, *expected_rest) = results
    assert rest == expected_rest
    assert_all_equal(got, expected)


def test_state_dicts_load_both_ways():
    ours = metalayers.MetaModule(two_layers(), lora(metalayers))
    theirs = l2l.nn.MetaModule(two_layers(), lora(l2l.nn.metalayers))
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    assert theirs.load_state_dict(ours.state_dict()).unexpected_keys == []


def test_module_gives_the_original_back():
    x = torch.randn(5, 3, dtype=torch.float64)
    for module in (metalayers, l2l.nn.metalayers):
        original = two_layers()
        expected, layers = original(x), list(original)
        model = module.MetaModule(original, lora(module))
        assert not torch.equal(model(x), expected)
        assert model.module() is original
        assert list(original) == layers
        assert torch.equal(model(x), expected)
        assert model.module() is original


def append(linear):
    return nn.Sequential(linear, nn.Linear(linear.out_features, linear.out_features).double())


def test_module_undoes_any_substitution():
    """learn2learn leaves replacements in place that have no attribute `module`."""
    original = two_layers()
    layers = list(original)
    model = metalayers.MetaModule(original, {nn.Linear: append})
    assert isinstance(model.wrapped_module[0], nn.Sequential)
    assert not model.wrapped_module[0][0].weight.requires_grad
    assert model.wrapped_module[0][1].weight.requires_grad
    assert model.module() is original
    assert list(original) == layers


def test_module_of_a_substituted_root():
    for substitution in (append, lambda linear: nn.Linear(3, 3).double()):
        original = nn.Linear(3, 3).double()
        model = metalayers.MetaModule(original, {nn.Linear: substitution})
        assert model.wrapped_module is not original
        assert model.module() is original


def test_containers_are_substituted_with_their_children():
    """learn2learn writes the children over those of the replacement."""
    x = torch.randn(5, 3, dtype=torch.float64)
    original = two_layers()
    expected, layers = original(x), list(original)
    substitutions = {
        nn.Sequential: lambda seq: nn.Sequential(seq, nn.Identity()),
        nn.Linear: lambda linear: nn.Sequential(nn.Identity(), linear),
    }
    model = metalayers.MetaModule(original, substitutions)
    assert model.wrapped_module[0] is original
    assert isinstance(original[0], nn.Sequential)
    assert torch.equal(model(x), expected)
    assert model.module() is original
    assert list(original) == layers


def test_replacements_that_take_over_children():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 3).double()

    class Patched(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.lin = block.lin

    for module in (metalayers, l2l.nn.metalayers):
        model = module.MetaModule(Block(), {Block: Patched, **lora(module)})
        assert isinstance(model.wrapped_module, Patched)
        assert isinstance(model.wrapped_module.lin, module.ParameterTransform)
        assert len(list(model.meta_parameters())) == 2
    original = Block()
    lin = original.lin
    model = metalayers.MetaModule(original, {Block: Patched, **lora(metalayers)})
    assert model.module() is original
    assert original.lin is lin


def test_shared_submodules_stay_shared():
    """learn2learn replaces only the first place."""
    linear = nn.Linear(3, 3).double()
    original = nn.Sequential(linear, nn.Tanh(), linear)
    model = metalayers.MetaModule(original, lora(metalayers))
    assert model.wrapped_module[0] is model.wrapped_module[2]
    assert isinstance(model.wrapped_module[2], metalayers.ParameterTransform)
    assert len(list(model.meta_parameters())) == 2
    assert model.module() is original
    assert original[0] is original[2] is linear


def test_nested_meta_modules_name_each_parameter_once():
    inner = metalayers.MetaModule(two_layers(), lora(metalayers))
    model = metalayers.MetaModule(nn.Sequential(inner), {})
    assert len(list(model.meta_parameters())) == 4
    assert len(list(model.meta_parameters(inner.wrapped_module[0]))) == 2


@pytest.mark.parametrize("copier", [utils.clone_module, copy.deepcopy])
def test_copies_of_a_meta_module(copier):
    x = torch.randn(5, 3, dtype=torch.float64)
    original = two_layers()
    expected = original(x)
    model = metalayers.MetaModule(original, lora(metalayers))
    copied = copier(model)
    assert torch.equal(copied(x), model(x))
    assert torch.equal(copied.module()(x), expected)
    assert isinstance(model.wrapped_module[0], metalayers.ParameterTransform)


def test_none_children_and_parameters():
    original = nn.Sequential(nn.Linear(3, 3, bias=False))
    original.add_module("nothing", None)
    model = metalayers.MetaModule(original, lora(metalayers))
    assert model.wrapped_module.nothing is None
    assert not original[0].module.weight.requires_grad


def test_meta_module_errors():
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module, got int"):
        metalayers.MetaModule(3, {})
    with pytest.raises(TypeError, match="substitutions: expected a mapping, got list"):
        metalayers.MetaModule(two_layers(), [])
    for bad in ({"Linear": append}, {nn.Linear: 3}):
        with pytest.raises(TypeError, match="substitutions: expected classes mapped to callables"):
            metalayers.MetaModule(two_layers(), bad)
    with pytest.raises(TypeError, match="substitutions: expected the one for Linear to return a"):
        metalayers.MetaModule(two_layers(), {nn.Linear: lambda linear: None})


# ----------------------------------------------------------------------------- ParameterTransform


def test_parameter_transform_matches_learn2learn():
    x = torch.randn(5, 3, dtype=torch.float64)
    results = []
    for module in (metalayers, l2l.nn.metalayers):
        linear = two_layers()[0]
        weight = linear.weight
        model = module.ParameterTransform(linear, scale())
        y = model(x)
        assert linear.weight is weight
        meta = list(model.meta_parameters())
        grads = torch.autograd.grad(y.pow(2).sum(), list(model.parameters()))
        names = [n for n, _ in model.named_parameters()]
        results.append(([y, *meta, *grads], names, list(model.state_dict())))
    (got, *rest), (expected, *expected_rest) = results
    assert rest == expected_rest
    assert_all_equal(got, expected)


def test_a_transform_that_is_a_module_is_registered():
    class Make(nn.Module):
        def __init__(self):
            super().__init__()
            self.bound = nn.Parameter(torch.ones(1))

        def forward(self, param):
            return knn.Scale(param.shape)

    for module in (metalayers, l2l.nn.metalayers):
        keys = list(module.ParameterTransform(nn.Linear(2, 2, bias=False), Make()).state_dict())
        assert keys == ["module.weight", "transform.bound", "parameter_transforms.weight.alpha"]


def test_dotted_names():
    """learn2learn raises KeyError on a module with submodules."""
    x = torch.randn(5, 3, dtype=torch.float64)
    inner = two_layers()
    model = metalayers.ParameterTransform(inner, scale())
    assert list(model.parameter_transforms) == ["0/weight", "0/bias", "2/weight", "2/bias"]
    scaled = copy.deepcopy(inner)
    with torch.no_grad():
        for p in scaled.parameters():
            p.mul_(0.5)
    params = list(inner.parameters())
    assert_all_equal([model(x)], [scaled(x)])
    assert all(p is q for p, q in zip(inner.parameters(), params, strict=True))


def test_tied_parameters_are_transformed_together():
    inner = two_layers()
    inner[2] = nn.Linear(4, 3).double()
    inner.append(nn.Linear(3, 4).double())
    inner[3].weight = inner[0].weight
    model = metalayers.ParameterTransform(inner, scale(2.0))
    assert "3/weight" not in model.parameter_transforms
    scaled = copy.deepcopy(inner)
    with torch.no_grad():
        for p in scaled.parameters():
            p.mul_(2.0)
    x = torch.randn(5, 3, dtype=torch.float64)
    assert_all_equal([model(x)], [scaled(x)])
    assert inner[3].weight is inner[0].weight


def test_recurrent_modules():
    """learn2learn's LSTM goes on using the original weights."""
    inner = nn.LSTM(3, 4, num_layers=2).double()
    model = metalayers.ParameterTransform(inner, scale(0.25))
    scaled = copy.deepcopy(inner)
    with torch.no_grad():
        for p in scaled.parameters():
            p.mul_(0.25)
    x = torch.randn(5, 1, 3, dtype=torch.float64)
    before = inner(x)[0]
    assert_all_equal([model(x)[0]], [scaled(x)[0]])
    assert_all_equal([inner(x)[0]], [before])


def test_parameters_are_restored_after_an_error():
    class Fails(nn.Module):
        def forward(self, param):
            raise RuntimeError("no")

    linear = two_layers()[0]
    params = list(linear.parameters())
    model = metalayers.ParameterTransform(linear, scale())
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.zeros(5, 7, dtype=torch.float64))
    assert all(p is q for p, q in zip(linear.parameters(), params, strict=True))
    makers = iter([knn.Scale().double(), Fails()])
    model = metalayers.ParameterTransform(linear, lambda param: next(makers))
    with pytest.raises(RuntimeError, match="no"):
        model(torch.zeros(5, 3, dtype=torch.float64))
    assert all(p is q for p, q in zip(linear.parameters(), params, strict=True))


def test_clones_can_be_called():
    """learn2learn cannot assign a clone's tensors, which are no Parameters."""
    x = torch.randn(5, 3, dtype=torch.float64)
    model = metalayers.ParameterTransform(two_layers(), scale())
    clone = utils.clone_module(model)
    utils.update_module(clone, [torch.ones_like(p) for p in clone.parameters()])
    grads = torch.autograd.grad(clone(x).sum(), list(model.parameters()))
    assert all(g.abs().sum() > 0 for g in grads)


def test_replicas_hold_parameters_as_attributes():
    """As nn.DataParallel makes them."""
    x = torch.randn(5, 3, dtype=torch.float64)
    model = metalayers.ParameterTransform(nn.Sequential(nn.Linear(3, 2)).double(), scale())
    expected = model(x)
    linear = model.module[0]
    for key in ("weight", "bias"):
        tensor = linear._parameters.pop(key).detach()
        setattr(linear, key, tensor)
    assert_all_equal([model(x)], [expected])
    assert linear.bias is tensor


def test_parameter_transform_errors():
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module, got int"):
        metalayers.ParameterTransform(3, scale())
    with pytest.raises(TypeError, match="transform: expected a callable, got int"):
        metalayers.ParameterTransform(nn.Linear(2, 2), 3)
    with pytest.raises(TypeError, match=r"return a torch\.nn\.Module for 'weight', got NoneType"):
        metalayers.ParameterTransform(nn.Linear(2, 2), lambda param: None)
