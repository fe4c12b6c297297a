"""fastkfo.nn (without metalayers) against learn2learn's own, and KroneckerNetwork."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastkfo.nn as knn
from tests.nn_pairs import (
    SIZES,
    close,
    dtypes,
    l2l,
    outputs_and_grads,
    pair,
    psds,
    randomize,
)

# -------------------------------------------------------------------------------- kronecker_addmm


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.3, -2.0), (1, 0)])
def test_addmm_matches_learn2learn(alpha, beta, bias):
    a, b, c = torch.randn(3, 3), torch.randn(5, 5), torch.randn(2, 3, 5)
    args = (a, b, c, torch.randn(3, 5) if bias else None, alpha, beta)
    torch.testing.assert_close(
        knn.kronecker_addmm(*args), l2l.nn.kronecker_addmm(*args), rtol=0, atol=0
    )


def test_addmm_is_a_dense_kronecker_product():
    a, b, c = (torch.randn(*s, dtype=torch.float64) for s in [(3, 3), (5, 5), (3, 5)])
    dense = torch.kron(b.t().contiguous(), a) @ c.t().flatten()
    close(knn.kronecker_addmm(a, b, c).t().flatten(), dense)


def test_addmm_tensor_scales_get_gradients():
    a, b, c, d = (torch.randn(*s, dtype=torch.float64) for s in [(3, 3), (2, 2), (3, 2), (3, 2)])
    alpha = torch.ones((), dtype=torch.float64, requires_grad=True)
    beta = torch.ones((), dtype=torch.float64, requires_grad=True)
    out = knn.kronecker_addmm(a, b, c, d, alpha, beta).sum()
    grads = torch.autograd.grad(out, (alpha, beta))
    close(torch.stack(grads), torch.stack([(a @ c @ b).sum(), d.sum()]))


def test_addmm_leaves_its_inputs():
    mats = [torch.randn(2, 2) for _ in range(4)]
    before = [m.clone() for m in mats]
    knn.kronecker_addmm(*mats, 0.5, 0.5)
    torch.testing.assert_close(mats, before, rtol=0, atol=0)


# -------------------------------------------------------------------------------- KroneckerLinear


@psds
@pytest.mark.parametrize("bias", [False, True])
@given(n=SIZES, m=SIZES, batch=st.lists(st.integers(0, 3), max_size=2))
def test_linear_matches_learn2learn(psd, bias, n, m, batch):
    ours, theirs = pair("KroneckerLinear", n, m, bias=bias, psd=psd)
    x = torch.randn(*batch, n, m, dtype=torch.float64)
    for got, expected in zip(outputs_and_grads(ours, x), outputs_and_grads(theirs, x), strict=True):
        close(got, expected)


@psds
@dtypes
@given(n=SIZES, m=SIZES)
def test_linear_on_a_vector_is_the_dense_product(psd, dtype, n, m):
    ours, theirs = pair("KroneckerLinear", n, m, psd=psd, dtype=dtype)
    x = torch.randn(n * m, dtype=dtype)
    y = ours(x)
    close(y, theirs(x))
    left, right = ours.left, ours.right
    if psd:
        left, right = left.t() @ left, right.t() @ right
    dense = torch.kron(right.t().contiguous(), left) @ x + ours.bias.t().flatten()
    torch.testing.assert_close(y, dense, rtol=1e-4, atol=1e-4)
    close(ours(x.view(m, n).t()).t().flatten(), y)


@psds
@dtypes
@given(n=SIZES, m=SIZES)
def test_linear_is_exact_at_identity(psd, dtype, n, m):
    layer = knn.KroneckerLinear(n, m, psd=psd, dtype=dtype)
    for x in (torch.randn(n, m, dtype=dtype), torch.randn(3, n, m, dtype=dtype)):
        assert torch.equal(layer(x), x)
    x = torch.randn(n * m, dtype=dtype)
    assert torch.equal(layer(x), x)


@psds
def test_linear_gradcheck(psd):
    layer = randomize(knn.KroneckerLinear(3, 2, psd=psd, dtype=torch.float64))
    names = [n for n, _ in layer.named_parameters()]

    def function(x, *params):
        return torch.func.functional_call(layer, dict(zip(names, params, strict=True)), (x,))

    inputs = (torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True), *layer.parameters())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_linear_noncontiguous_input():
    ours, theirs = pair("KroneckerLinear", 3, 4)
    x = torch.randn(4, 3, 2, dtype=torch.float64).permute(2, 1, 0)
    close(ours(x), theirs(x))
    assert torch.equal(ours(x), ours(x.contiguous()))
    v = torch.randn(24, dtype=torch.float64)[::2]
    close(ours(v), theirs(v))


def test_linear_keys_and_dtype():
    assert list(knn.KroneckerLinear(2, 3).state_dict()) == ["left", "right", "bias"]
    layer = knn.KroneckerLinear(2, 3, bias=False, dtype=torch.float64)
    assert list(layer.state_dict()) == ["left", "right"]
    assert layer.bias is None
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    ours = list(inspect.signature(knn.KroneckerLinear).parameters.values())
    theirs = list(inspect.signature(l2l.nn.KroneckerLinear).parameters.values())
    assert [(p.name, p.default) for p in ours[:-1]] == [(p.name, p.default) for p in theirs]
    assert ours[-1].name == "dtype"
    assert repr(layer) == "KroneckerLinear(n=2, m=3, bias=False, psd=False)"


def test_linear_device_follows_the_parameters():
    layer = knn.KroneckerLinear(2, 3, device="meta").to_empty(device="cpu")
    for p in layer.parameters():
        nn.init.ones_(p)
    assert layer(torch.ones(2, 3)).device.type == "cpu"


@pytest.mark.gpu
def test_linear_takes_the_input_to_its_device_and_back():
    ours = knn.KroneckerLinear(2, 3, device="cuda")
    x = torch.randn(2, 3)
    assert torch.equal(ours(x), x)
    assert ours.left.is_cuda


def test_linear_under_autocast():
    layer = knn.KroneckerLinear(3, 2)
    x = torch.randn(4, 3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
        layer(x.bfloat16())


@pytest.mark.parametrize("shape", [(3, 2), (4, 3, 2), (2, 2), (5,), (7,), (), (6, 1)])
def test_linear_bad_shape(shape):
    for module in (knn, l2l.nn):
        with pytest.raises(ValueError):  # noqa: PT011 (the text is ours, and checked below)
            module.KroneckerLinear(2, 3)(torch.zeros(shape))
    expected = (
        r"x: expected shape \(\.\.\., n, m\) = \(\.\.\., 2, 3\) or \(n \* m,\) = \(6,\), got "
    )
    with pytest.raises(ValueError, match=expected + str(shape).replace("(", r"\(")[:-1]):
        knn.KroneckerLinear(2, 3)(torch.zeros(shape))


def test_linear_bad_input():
    layer = knn.KroneckerLinear(2, 3)
    with pytest.raises(TypeError, match="x: expected a Tensor, got list"):
        layer([1.0])
    with pytest.raises(TypeError, match=r"x: expected dtype torch\.float32, got torch\.float64"):
        layer(torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "name", ["KroneckerLinear", "KroneckerRNN", "KroneckerLSTM", "KroneckerNetwork"]
)
def test_bad_sizes(name):
    cls = getattr(knn, name)
    with pytest.raises(TypeError, match="n: expected an int, got float"):
        cls(2.0, 3)
    with pytest.raises(ValueError, match="m: expected a size of at least 0, got -1"):
        cls(2, -1)


# ------------------------------------------------------------------------- KroneckerRNN and -LSTM


@pytest.mark.parametrize("sigma", [None, torch.relu], ids=["default", "relu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 2), (4, 3, 2), (6,)], ids=str)
@dtypes
def test_rnn_matches_learn2learn(dtype, shape, bias, sigma):
    ours, theirs = pair("KroneckerRNN", 3, 2, bias=bias, sigma=sigma, dtype=dtype)
    x, h = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    for got, expected in zip(ours(x, h), theirs(x, h), strict=True):
        close(got, expected)


@pytest.mark.parametrize("sigma", [None, torch.tanh], ids=["default", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 2), (4, 3, 2), (6,)], ids=str)
@dtypes
def test_lstm_matches_learn2learn(dtype, shape, bias, sigma):
    ours, theirs = pair("KroneckerLSTM", 3, 2, bias=bias, sigma=sigma, dtype=dtype)
    x, h, c = (torch.randn(shape, dtype=dtype) for _ in range(3))
    y, state = ours(x, (h, c))
    expected_y, expected_state = theirs(x, (h, c))
    close(y, expected_y)
    for got, expected in zip(state, expected_state, strict=True):
        close(got, expected)


@pytest.mark.parametrize("name", ["KroneckerRNN", "KroneckerLSTM"])
def test_recurrent_options(name):
    cls = getattr(knn, name)
    assert {p.dtype for p in cls(2, 3, dtype=torch.float64).parameters()} == {torch.float64}
    with pytest.raises(TypeError, match="sigma: expected a callable on tensors, got 3"):
        cls(2, 3, sigma=3)
    with pytest.raises(TypeError, match=r"sigma: .* got the class ReLU; pass an instance"):
        cls(2, 3, sigma=nn.ReLU)


# ------------------------------------------------------------------------------- KroneckerNetwork

ACTIVATIONS = {
    "default": None,
    "tanh function": torch.tanh,
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "elu": nn.ELU(),
    "softsign": nn.Softsign(),
    "steep tanh": lambda x: torch.tanh(3 * x),
}


@psds
@dtypes
@pytest.mark.parametrize("hidden_layers", [0, 1, 2, 3])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_network_starts_close_to_the_identity(activation, hidden_layers, dtype, psd):
    net = knn.KroneckerNetwork(3, 4, hidden_layers, ACTIVATIONS[activation], psd=psd, dtype=dtype)
    assert len(net.layers) == hidden_layers + 1
    for shape in [(3, 4), (2, 3, 4), (12,)]:
        x = torch.rand(shape, dtype=dtype) * 2 - 1
        y = net(x)
        assert y.dtype == dtype
        assert (y - x).norm() <= 0.03 * x.norm()
        small = x / 100
        assert (net(small) - small).norm() <= 1e-3 * small.norm()


def test_network_with_a_negative_slope():
    net = knn.KroneckerNetwork(3, 4, activation=lambda x: -torch.tanh(3 * x))
    x = torch.randn(3, 4)
    assert (net(x) - x).norm() <= 0.03 * x.norm()


def test_network_keys_and_gradients():
    net = knn.KroneckerNetwork(n=3, m=2, bias=True, psd=True, device="cpu", dtype=torch.float64)
    expected = [f"layers.{i}.{k}" for i in range(3) for k in ("left", "right", "bias")]
    assert list(net.state_dict()) == expected
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net, x)
    assert torch.autograd.gradgradcheck(net, x)
    grads = torch.autograd.grad(net(x).pow(2).sum(), list(net.parameters()))
    assert all(g.abs().sum() > 0 for g in grads)


def test_network_is_not_linear():
    net = randomize(knn.KroneckerNetwork(3, 2, bias=False, dtype=torch.float64))
    x = torch.randn(3, 2, dtype=torch.float64)
    assert not torch.allclose(net(2 * x), 2 * net(x), rtol=1e-2)


def test_network_is_its_formula():
    net = randomize(knn.KroneckerNetwork(3, 2, hidden_layers=1, psd=True, dtype=torch.float64))
    x = torch.randn(3, 2, dtype=torch.float64)
    y = x
    for i, layer in enumerate(net.layers):
        if i:
            y = torch.tanh(y)
        y = layer.left.t() @ layer.left @ y @ layer.right.t() @ layer.right + layer.bias
    close(net(x), y)


def test_network_as_a_kronecker_transform():
    """learn2learn's own KroneckerTransform takes it."""
    transform = l2l.optim.KroneckerTransform(knn.KroneckerNetwork)
    conv = nn.Conv2d(3, 4, 3)
    for param in conv.parameters():
        grad = torch.randn_like(param)
        update = transform(param)(grad)
        assert update.shape == param.shape
        assert (update - grad).norm() <= 1e-2 * grad.norm()


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (torch.sigmoid, r"expected f\(0\) = 0, got f\(0\) = 0\.5"),
        (torch.cos, r"expected f\(0\) = 0, got f\(0\) = 1"),
        (lambda x: 1 / x, r"expected f\(0\) = 0, got f\(0\) = inf"),
        (torch.square, r"expected a finite, non-zero slope at 0, got 0"),
        (nn.Hardshrink(), r"expected a finite, non-zero slope at 0, got 0"),
        (torch.relu, r"expected one slope at 0, got 0 on the left and 1 on the right"),
        (nn.LeakyReLU(0.5), r"expected one slope at 0, got 0\.5 on the left and 1 on the right"),
        (lambda x: x.sign() * x.abs().pow(1e-3) * 1e6, "expected a finite, non-zero slope"),
        (lambda x: x.sum(), "expected an elementwise function"),
        (nn.Softmax(dim=-1), r"expected f\(0\) = 0"),
    ],
)
def test_network_bad_activation(activation, message):
    with pytest.raises(ValueError, match=f"activation: {message}"):
        knn.KroneckerNetwork(2, 3, activation=activation)


def test_network_bad_arguments():
    with pytest.raises(ValueError, match="activation: expected a positive slope at 0 with psd"):
        knn.KroneckerNetwork(2, 3, activation=lambda x: -x.tanh(), psd=True)
    with pytest.raises(TypeError, match="activation: expected a callable on tensors, got tanh"):
        knn.KroneckerNetwork(2, 3, activation="tanh")
    with pytest.raises(TypeError, match=r"activation: .* got the class Tanh; pass an instance"):
        knn.KroneckerNetwork(2, 3, activation=nn.Tanh)
    with pytest.raises(ValueError, match="hidden_layers: expected a size of at least 0, got -1"):
        knn.KroneckerNetwork(2, 3, hidden_layers=-1)
    with pytest.raises(ValueError, match=r"x: expected shape"):
        knn.KroneckerNetwork(2, 3)(torch.zeros(3, 2))
