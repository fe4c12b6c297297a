"""Draws without replacement: distinct, in range, and every ordered subset as likely."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastkfo.tasks import draws

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called

WAYS = {
    "keys": draws.by_keys,
    "insertion": lambda r, s, k, _, g: draws.by_insertion(r, s, k, g),
    "chosen": draws.distinct,
}


def generator(device, seed=0):
    return torch.Generator(device).manual_seed(seed)


def assert_uniform(counts, probability):
    """Within five standard deviations of what chi-square has for independent cells."""
    expected = counts.sum() * probability
    assert expected > 20
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(("size", "k"), [(2, 1), (3, 3), (4, 2), (5, 3)])
def test_every_ordered_subset_is_as_likely(how, size, k, device):
    rows = 20_000
    drawn = WAYS[how](rows, size, k, size, generator(device)).cpu()
    found = dict.fromkeys(itertools.permutations(range(size), k), 0)
    for row in drawn.tolist():
        found[tuple(row)] += 1
    assert_uniform(torch.tensor(list(found.values()), dtype=torch.float64), 1 / len(found))


@pytest.mark.parametrize("how", WAYS)
def test_large_pools_are_drawn_evenly(how, device):
    drawn = WAYS[how](2_000, 500, 7, 500, generator(device)).cpu()
    for position in (0, 3, 6):  # the first are support, the last are queries
        counts = drawn[:, position].bincount(minlength=500).view(20, 25).sum(1)
        assert_uniform(counts.double(), 1 / 20)
    sums = drawn.double().sum(1)  # a mean of 7 of 500 without replacement
    assert abs(sums.mean() - 7 * 249.5) < 5 * sums.std() / 2_000**0.5
    variance = 7 * (500**2 - 1) / 12 * (500 - 7) / (500 - 1)
    assert abs(sums.var() / variance - 1) < 0.2


@pytest.mark.parametrize("how", WAYS)
def test_rows_of_unlike_sizes(how, device):
    sizes = torch.tensor([3, 4, 9, 5], device=device).repeat(10_000)
    drawn = WAYS[how](len(sizes), sizes, 3, 9, generator(device))
    assert (drawn < sizes[:, None]).all()
    assert (drawn >= 0).all()
    for size in (3, 4):
        rows = drawn[sizes == size].cpu()
        cells = (rows * torch.tensor([size**2, size, 1])).sum(1).bincount(minlength=size**3)
        found = [
            int(cells[a * size**2 + b * size + c])
            for a, b, c in itertools.permutations(range(size), 3)
        ]
        assert sum(found) == len(rows), "a number came twice"
        assert_uniform(torch.tensor(found, dtype=torch.float64), 1 / len(found))


@pytest.mark.parametrize("how", WAYS)
@given(data=st.data())
def test_distinct_and_in_range(how, data):
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    k = data.draw(st.integers(1, min(sizes)))
    drawn = WAYS[how](len(sizes), torch.tensor(sizes), k, max(sizes), generator("cpu"))
    assert drawn.shape == (len(sizes), k)
    assert drawn.dtype == torch.int64
    for row, size in zip(drawn.tolist(), sizes, strict=True):
        assert len(set(row)) == k
        assert set(row) <= set(range(size))


def test_what_is_cheaper_is_chosen(monkeypatch):
    used = []
    monkeypatch.setattr(draws, "by_keys", lambda *a: used.append("keys"))
    monkeypatch.setattr(draws, "by_insertion", lambda *a: used.append("insertion"))
    draws.distinct(4, 10, 5, 10, generator("cpu"))
    draws.distinct(100, 10_000, 5, 10_000, generator("cpu"))
    assert used == ["keys", "insertion"]


@pytest.mark.parametrize(("size", "k"), [(1, 1), (9, 4), (9, 9), (200, 20)])
@pytest.mark.parametrize("levels", [3, 50, None], ids=["many equal", "some equal", "distinct"])
def test_smallest_is_argsort_cut_short(size, k, levels):
    for seed in range(20):
        keys = torch.rand(2, 3, size, generator=generator("cpu", seed))
        keys = keys if levels is None else keys.mul(levels).floor()
        assert torch.equal(draws.smallest(keys, k), keys.argsort()[..., :k])
