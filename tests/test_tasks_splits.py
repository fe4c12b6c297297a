"""Disjoint splits of classes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastkfo.tasks import split_classes

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called


@given(
    st.sets(st.integers(-50, 200), min_size=3, max_size=60),
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.integers(0, 5),
)
def test_disjoint_and_of_the_sizes_asked_for(classes, counts, seed):
    if sum(counts) > len(classes):
        counts = [1, len(classes) - 1]
    parts = split_classes(classes, counts, seed)
    assert [len(p) for p in parts] == counts
    assert len({c for p in parts for c in p}) == sum(counts)
    assert {c for p in parts for c in p} <= classes
    assert all(list(p) == sorted(p) for p in parts)


@pytest.mark.parametrize(
    ("classes", "fractions", "sizes"),
    [
        (100, (0.64, 0.16, 0.2), [64, 16, 20]),
        (10, (0.5, 0.25), [5, 3]),
        (7, (0.1, 0.9), [1, 6]),
        (3, (1 / 3, 1 / 3, 1 / 3), [1, 1, 1]),
        (1, (1.0,), [1]),
    ],
)
def test_fractions(classes, fractions, sizes):
    parts = split_classes(range(classes), fractions)
    assert [len(p) for p in parts] == sizes
    assert len({c for p in parts for c in p}) == sum(sizes)


def test_seeds_and_the_order_of_labels():
    labels = torch.arange(40).repeat(3)
    state = torch.get_rng_state()
    one = split_classes(labels, (20, 20), seed=1)
    assert one == split_classes(labels.flip(0).numpy(), (20, 20), seed=1)
    assert one == split_classes(range(40), (0.5, 0.5), seed=1)
    assert one != split_classes(labels, (20, 20), seed=2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(isinstance(c, int) for c in one[0])


def test_names():
    assert sorted(sum(split_classes("cab", (1, 2)), ())) == ["a", "b", "c"]


def test_every_class_is_as_likely():
    counts = torch.zeros(5)
    for seed in range(1_000):
        counts[list(split_classes(range(5), (2,), seed)[0])] += 1
    assert (counts - 400).abs().max() < 5 * (1_000 * 0.24) ** 0.5


@pytest.mark.parametrize(
    ("labels", "sizes", "seed", "error", "message"),
    [
        (range(5), (3, 3), 0, ValueError, "sizes: expected at most 5, the number of classes, .* 6"),
        (range(5), (0.9, 0.2), 0, ValueError, "sizes: expected at most 1 in sum, got 1.1"),
        (range(5), (0.99, 0.01), 0, ValueError, "sizes: expected at least one of 5 classes"),
        (range(5), (3, 0.5), 0, TypeError, r"sizes: expected counts \(int\) or fractions"),
        (range(5), (True, 2), 0, TypeError, "sizes: expected counts"),
        (range(5), (), 0, TypeError, "sizes: expected counts"),
        (range(5), (3, 0), 0, ValueError, "sizes: expected positive numbers"),
        (range(5), (float("nan"),), 0, ValueError, "sizes: expected positive numbers"),
        ([], (1,), 0, ValueError, "sizes: expected at most 0"),
        ([1, "a"], (1,), 0, TypeError, "labels: expected integers or names"),
        (range(5), (3,), 1.0, TypeError, "seed: expected an int, got float"),
        (range(5), (3,), -1, ValueError, r"seed: expected 0 to 2\*\*63 - 1, got -1"),
        (range(5), (3,), 2**63, ValueError, "seed: expected 0 to .* got 9223372036854775808"),
    ],
)
def test_bad_input(labels, sizes, seed, error, message):
    with pytest.raises(error, match=message):
        split_classes(labels, sizes, seed)
