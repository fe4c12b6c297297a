"""The small modules of fastkfo.nn and the prototypical classifier against learn2learn."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastkfo.nn as knn
from tests.nn_pairs import (
    close,
    dtypes,
    l2l,
)

# ------------------------------------------------------------------------------------------- misc


def test_lambda():
    layer = knn.Lambda(lambda x, scale=1: x * scale)
    assert layer(torch.ones(1), scale=3) == 3
    with pytest.raises(TypeError, match="lmb: expected a callable, got int"):
        knn.Lambda(3)


@given(shape=st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_flatten(shape):
    x = torch.randn(shape)
    y = knn.Flatten()(x)
    assert y.shape == (shape[0], x[0].numel() if shape[0] else torch.Size(shape[1:]).numel())
    assert torch.equal(y.flatten(), x.flatten())
    if x.numel():
        assert torch.equal(y, l2l.nn.Flatten()(x))


def test_flatten_strides_and_errors():
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert torch.equal(knn.Flatten()(x), x.contiguous().view(2, -1))
    with pytest.raises(ValueError, match="x: expected at least one dimension"):
        knn.Flatten()(torch.tensor(1.0))


@pytest.mark.parametrize("shape", [None, 3, (2, 3), torch.Size([3])], ids=str)
def test_scale(shape):
    ours, theirs = knn.Scale(shape, alpha=0.5), l2l.nn.Scale(shape, alpha=0.5)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["alpha"]
    assert torch.equal(ours.alpha, theirs.alpha)
    x = torch.randn(2, 3)
    assert torch.equal(ours(x), theirs(x))
    with pytest.raises(TypeError, match=r"shape: expected None, an int or a sequence.* got float"):
        knn.Scale(1.5)


def test_freeze_unfreeze():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert knn.freeze(model) is model
    assert not any(p.requires_grad for p in model.parameters())
    assert knn.unfreeze(model) is model
    assert all(p.requires_grad for p in model.parameters())
    clone = l2l.clone_module(model)
    knn.freeze(clone)
    assert all(p.grad_fn is None and not p.requires_grad for p in clone.parameters())
    for function in (knn.freeze, knn.unfreeze):
        with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module, got int"):
            function(3)


# --------------------------------------------------------------------------------------- protonet


def support_set(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    support = torch.randn(12, 5, generator=generator, dtype=dtype)
    labels = torch.tensor([7, 2, 2, -1, 7, 2, -1, 7, 2, 2, 7, 2])
    query = torch.randn(4, 5, generator=generator, dtype=dtype)
    return support, labels, query


def test_compute_prototypes():
    support, labels, _ = support_set()
    got = knn.compute_prototypes(support.view(12, 5, 1), labels)
    assert got.shape == (3, 5, 1)
    assert torch.equal(got, l2l.nn.protonet.compute_prototypes(support.view(12, 5, 1), labels))


@dtypes
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("distance", ["euclidean", "cosine", lambda p, x: torch.cdist(x, p)])
def test_prototypical_classifier(distance, normalize, dtype):
    support, labels, query = support_set(dtype)
    results = []
    for module in (knn, l2l.nn):
        s, q = support.clone().requires_grad_(), query.clone().requires_grad_()
        classifier = module.PrototypicalClassifier(s, labels, distance, normalize)
        assert list(classifier.state_dict()) == []
        logits = classifier(q)
        results.append([logits, *torch.autograd.grad(logits.pow(2).sum(), (s, q))])
        later = module.PrototypicalClassifier(distance=distance, normalize=normalize)
        prototypes = later.fit_(support, labels)
        assert prototypes is later.prototypes
        results[-1] += [prototypes, later(query)]
        assert later.normalize is (normalize or distance == "cosine")
    for got, expected in zip(*results, strict=True):
        close(got, expected)


def test_prototypical_classifier_errors():
    support, labels, query = support_set()
    with pytest.raises(ValueError, match="distance: expected 'euclidean' or 'cosine', got 'l1'"):
        knn.PrototypicalClassifier(distance="l1")
    with pytest.raises(TypeError, match="distance: expected a string or a callable, got int"):
        knn.PrototypicalClassifier(distance=1)
    with pytest.raises(ValueError, match="labels: expected support and labels together, got None"):
        knn.PrototypicalClassifier(support)
    with pytest.raises(ValueError, match="support: expected support and labels together"):
        knn.PrototypicalClassifier(labels=labels)
    with pytest.raises(ValueError, match=r"labels: expected shape \[N\].*got \(3,\)"):
        knn.PrototypicalClassifier(support, labels[:3])
    with pytest.raises(ValueError, match=r"labels: expected shape \[N\] with N >= 1"):
        knn.PrototypicalClassifier(support[:0], labels[:0])
    with pytest.raises(TypeError, match=r"support: expected a floating dtype, got torch\.int64"):
        knn.compute_prototypes(support.long(), labels)
    with pytest.raises(RuntimeError, match="no prototypes yet"):
        knn.PrototypicalClassifier()(query)
    with pytest.raises(ValueError, match=r"x: expected shape \[Q, 5\], got \(4, 3\)"):
        knn.PrototypicalClassifier(support, labels)(query[:, :3])
