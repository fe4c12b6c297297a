"""The plain loop against learn2learn, and against central differences, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastkfo.reference.loop import Factors, adapt, factors_of, kronecker, meta_gradient
from fastkfo.reference.transforms import Curvature
from tests.oracle import learn2learn

STEPS, LR = 3, 0.1


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 7), nn.Tanh(), nn.Linear(7, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, bias=False),  # a bias before batch norm has no gradient
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


MODELS = {"mlp": mlp, "cnn": cnn}


@pytest.fixture
def tasks():
    torch.manual_seed(1)
    return (
        torch.randn(2, 6, 1, 6, 6, dtype=torch.float64),
        torch.randint(3, (2, 6)),
        torch.randn(2, 5, 1, 6, 6, dtype=torch.float64),
        torch.randint(3, (2, 5)),
    )


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().double()


def gbml(model, **options):
    """learn2learn's GBML, with factors away from the identity (it makes them in float32)."""
    l2l = learn2learn()
    kind = {key: options.pop(key) for key in ("bias", "psd")}
    transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear, **kind)
    learner = l2l.algorithms.GBML(model, transform=transform, lr=LR, **options).double()
    for parameter in learner.compute_update.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return learner


def oracle_gradient(learner, x_s, y_s, x_q, y_q):
    """learn2learn's own loop; gradients in ``.grad``, query losses returned."""
    losses = []
    for task in range(len(x_s)):
        clone = learner.clone()
        for _ in range(STEPS):
            clone.adapt(F.cross_entropy(clone(x_s[task]), y_s[task]))
        losses.append(F.cross_entropy(clone(x_q[task]), y_q[task]))
    sum(losses).div(len(losses)).backward()
    return torch.stack(losses).detach()


def check(model, factors, ours, losses):
    torch.testing.assert_close(ours.losses, losses, rtol=1e-12, atol=0)
    for name, parameter in model.named_parameters():
        assert_close(ours.parameters[name], parameter.grad)
    for name, expected in factors.items():
        for gradient, factor in zip(ours.factors[name], expected, strict=True):
            assert (gradient is None) == (factor is None)
            if factor is not None:
                assert_close(gradient, factor.grad)


def assert_close(ours, theirs):
    assert theirs.norm() > 0
    assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("psd", [False, True], ids=["plain", "psd"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize(
    ("first_order", "adapt_transform"),
    [(False, False), (True, False), (False, True)],  # learn2learn crashes where both are True
    ids=["second", "first", "second-adapt"],
)
def test_kfo_equals_learn2learn(model, psd, bias, first_order, adapt_transform, tasks):
    model = build(model)
    options = {"psd": psd, "first_order": first_order, "adapt_transform": adapt_transform}
    learner = gbml(model, bias=bias, **options)
    losses = oracle_gradient(learner, *tasks)
    factors = factors_of(learner)
    ours = meta_gradient(
        model, *tasks, loss=F.cross_entropy, steps=STEPS, lr=LR, factors=factors, **options
    )
    check(model, factors, ours, losses)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
def test_maml_equals_learn2learn(model, first_order, tasks):
    model = build(model)
    learner = learn2learn().algorithms.MAML(model, lr=LR, first_order=first_order)
    losses = oracle_gradient(learner, *tasks)
    ours = meta_gradient(
        model, *tasks, loss=F.cross_entropy, steps=STEPS, lr=LR, first_order=first_order
    )
    check(model, {}, ours, losses)
    assert ours.factors == {}


def moved(learner):
    """The learner in float64, its transforms off their initial values."""
    learner.double()
    own = {id(p) for p in learner.module.parameters()}
    for parameter in learner.parameters():
        if id(parameter) not in own:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return learner


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
def test_meta_sgd_equals_learn2learn(model, first_order, tasks):
    model = build(model)
    learner = moved(learn2learn().algorithms.MetaSGD(model, lr=LR, first_order=first_order))
    losses = oracle_gradient(learner, *tasks)
    factors = factors_of(learner)
    ours = meta_gradient(
        model, *tasks, loss=F.cross_entropy, steps=STEPS, lr=1.0, factors=factors,
        first_order=first_order,
    )  # fmt: skip
    assert list(factors) == [name for name, _ in model.named_parameters()]
    check(model, factors, ours, losses)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("first_order", "adapt_transform"),
    [(False, False), (True, False), (False, True)],
    ids=["second", "first", "second-adapt"],
)
def test_meta_curvature_equals_learn2learn(model, first_order, adapt_transform, tasks):
    model = build(model)
    l2l = learn2learn()
    options = {"first_order": first_order, "adapt_transform": adapt_transform}
    transform = l2l.optim.MetaCurvatureTransform
    learner = moved(l2l.algorithms.GBML(model, transform, lr=LR, **options))
    losses = oracle_gradient(learner, *tasks)
    factors = factors_of(learner)
    ours = meta_gradient(
        model, *tasks, loss=F.cross_entropy, steps=STEPS, lr=LR, factors=factors, **options
    )
    assert all(isinstance(phi, Curvature) for phi in factors.values())
    check(model, factors, ours, losses)


@pytest.mark.parametrize("adapt_transform", [None, False, True], ids=["maml", "kfo", "kfo-adapt"])
def test_features_equal_learn2learn(adapt_transform, tasks):
    """ANIL: one pass of the extractor over support and query, and a head that is adapted."""
    features, head = nn.Sequential(*build("cnn")[:-1]), nn.Linear(16, 3).double()
    if adapt_transform is None:
        learner, factors, options = learn2learn().algorithms.MAML(head, lr=LR), {}, {}
    else:
        options = {"psd": True, "adapt_transform": adapt_transform}
        learner = gbml(head, bias=False, **options)
        factors = factors_of(learner)

    losses = []
    for x_s, y_s, x_q, y_q in zip(*tasks, strict=True):
        support, queries = features(torch.cat([x_s, x_q])).split([len(x_s), len(x_q)])
        clone = learner.clone()
        for _ in range(STEPS):
            clone.adapt(F.cross_entropy(clone(support), y_s))
        losses.append(F.cross_entropy(clone(queries), y_q))
    sum(losses).div(len(losses)).backward()

    ours = meta_gradient(
        head, *tasks, loss=F.cross_entropy, steps=STEPS, lr=LR, factors=factors,
        features=features, **options,
    )  # fmt: skip
    check(head, factors, ours, torch.stack(losses).detach())
    assert list(ours.features) == [name for name, _ in features.named_parameters()]
    for name, parameter in features.named_parameters():
        assert_close(ours.features[name], parameter.grad)


@pytest.mark.parametrize("adapt_transform", [False, True], ids=["fixed", "adapt"])
@pytest.mark.parametrize("psd", [False, True], ids=["plain", "psd"])
def test_central_differences(psd, adapt_transform, tasks):
    model = build("cnn")
    factors = random_factors(model)
    options = {"steps": STEPS, "lr": LR, "psd": psd, "adapt_transform": adapt_transform}

    def value():
        result = meta_gradient(model, *tasks, loss=F.cross_entropy, factors=factors, **options)
        return result.losses.mean().item(), result

    _, exact = value()
    inputs = list(model.parameters()) + [t for f in factors.values() for t in f]
    gradients = list(exact.parameters.values()) + [t for f in exact.factors.values() for t in f]
    for tensor, gradient in zip(inputs, gradients, strict=True):
        direction = torch.randn_like(tensor)
        sides = []
        for sign in (1, -1):
            tensor.data += sign * 1e-5 * direction
            sides.append(value()[0])
            tensor.data -= sign * 1e-5 * direction
        numeric = (sides[0] - sides[1]) / 2e-5
        expected = (gradient * direction).sum().item()
        assert numeric == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_first_order_with_adapt_transform_follows_its_formula(tasks):
    """Where learn2learn crashes: constant gradients, but factors differentiable in themselves."""
    x_s, y_s, x_q, y_q = (t[:1] for t in tasks)
    model = nn.Linear(36, 3, bias=False).double()
    x_s, x_q = x_s.flatten(2), x_q.flatten(2)
    factors = random_factors(model)
    ours = meta_gradient(
        model, x_s, y_s, x_q, y_q, loss=F.cross_entropy, steps=2, lr=LR, factors=factors,
        psd=False, first_order=True, adapt_transform=True,
    )  # fmt: skip

    left, right, bias = factors["weight"]
    theta = model.weight

    def gradient(weight):
        weight = weight.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(x_s[0] @ weight.T, y_s[0]), weight)[0]

    g_0 = gradient(theta)
    theta_1 = theta - LR * (left @ g_0 @ right + bias)
    g_1 = gradient(theta_1)
    left_1 = left + LR**2 * g_1 @ right.T @ g_0.T
    right_1 = right + LR**2 * g_0.T @ left.T @ g_1
    bias_1 = bias + LR**2 * g_1
    theta_2 = theta_1 - LR * (left_1 @ g_1 @ right_1 + bias_1)
    F.cross_entropy(x_q[0] @ theta_2.T, y_q[0]).backward()
    assert_close(ours.parameters["weight"], theta.grad)
    for ours_, factor in zip(ours.factors["weight"], factors["weight"], strict=True):
        assert_close(ours_, factor.grad)


@pytest.mark.parametrize(
    ("shape", "n", "m"), [((5, 3), 5, 3), ((4,), 4, 1), ((6, 2, 3, 3), 2, 9)], ids=str
)
@pytest.mark.parametrize("psd", [False, True], ids=["plain", "psd"])
def test_kronecker_is_the_dense_product(shape, n, m, psd):
    torch.manual_seed(0)
    g = torch.randn(shape, dtype=torch.float64)
    left, right = torch.randn(n, n, dtype=torch.float64), torch.randn(m, m, dtype=torch.float64)
    bias = torch.randn(n, m, dtype=torch.float64)
    a, c = (left.T @ left, right.T @ right) if psd else (left, right)
    dense = torch.kron(a, c.T.contiguous())  # acts on row-major [n, m]
    expected = g.reshape(-1, n * m) @ dense.T + bias.flatten()
    torch.testing.assert_close(
        kronecker(g, Factors(left, right, bias), psd), expected.reshape(shape)
    )


def test_parameters_without_factors_and_frozen_ones(tasks):
    model = build("mlp")
    model[1].bias.requires_grad_(False)
    factors = {"3.weight": random_factors(model)["3.weight"]}
    result = meta_gradient(model, *tasks, loss=F.cross_entropy, steps=2, lr=LR, factors=factors)
    assert list(result.parameters) == ["1.weight", "3.weight", "3.bias"]
    assert list(result.factors) == ["3.weight"]


def test_nothing_is_touched(tasks):
    model = build("mlp")
    before = [p.clone() for p in model.parameters()]
    meta_gradient(model, *tasks, loss=F.cross_entropy, steps=2, lr=LR)
    adapted = adapt(model, tasks[0][0], tasks[1][0], loss=F.cross_entropy, steps=2, lr=LR)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert all(a.grad_fn is not None for a in adapted.values())


def test_numbers_of_tasks_must_agree(tasks):
    x_s, y_s, x_q, y_q = tasks
    options = {"loss": F.cross_entropy, "steps": 1, "lr": LR}
    with pytest.raises(ValueError, match=r"expected the same number of tasks.* got 2, 2, 1, 2"):
        meta_gradient(build("mlp"), x_s, y_s, x_q[:1], y_q, **options)
    with pytest.raises(ValueError, match="at least 1, got 0, 0, 0, 0"):
        meta_gradient(build("mlp"), *(t[:0] for t in tasks), **options)


def test_factors_of_other_transforms():
    l2l = learn2learn()
    learner = l2l.algorithms.GBML(mlp(), transform=l2l.optim.ModuleTransform(l2l.nn.Scale))
    with pytest.raises(TypeError, match=r"learner: expected .* for '1.weight', got"):
        factors_of(learner)


def random_factors(model):
    factors = {}
    for name, p in model.named_parameters():
        rows, cols = (p.shape[1], p.shape[2:].numel()) if p.dim() == 4 else (*p.shape, 1)[:2]
        pieces = [torch.eye(rows), torch.eye(cols), torch.zeros(rows, cols)]
        noisy = [(t + 0.2 * torch.randn(t.shape)).double().requires_grad_() for t in pieces]
        factors[name] = Factors(*noisy)
    return factors
