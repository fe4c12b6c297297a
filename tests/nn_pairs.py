"""A module of ours and learn2learn's with the same weights, and what is compared of the two."""

import pytest
import torch
from hypothesis import strategies as st

import fastkfo.nn as knn
from tests.oracle import learn2learn

l2l = learn2learn()

DTYPES = [torch.float32, torch.float64]
SIZES = st.integers(1, 6)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
psds = pytest.mark.parametrize("psd", [False, True], ids=["plain", "psd"])


def randomize(module):
    """Move every parameter away from its initialisation, the same way for equal modules."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
    return module


def pair(name, *args, dtype=torch.float64, **kwargs):
    """Return our module and learn2learn's, with the same weights."""
    theirs = randomize(getattr(l2l.nn, name)(*args, **kwargs).to(dtype))
    ours = getattr(knn, name)(*args, **kwargs).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    return ours, theirs


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def outputs_and_grads(module, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = module(*inputs)
    loss = out.pow(2).sum()
    params = [*inputs, *module.parameters()]
    grads = torch.autograd.grad(loss, params, create_graph=True)
    second = torch.autograd.grad(sum(g.pow(2).sum() for g in grads), params)
    return [out, *grads, *second]
