"""Bookkeeping: learn2learn's, without loading what need not be; files of it; unions, filters."""

import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from fastkfo import data as ours
from tests.data_oracle import learn2learn_data

theirs = learn2learn_data()
NAMES = ("labels_to_indices", "indices_to_labels", "labels")


class Counting(Dataset):
    """Samples (position, label); counts how often one is loaded."""

    def __init__(self, labels, path=None):
        self.labels, self.loaded = labels, 0
        if path is not None:
            self._bookkeeping_path = str(path)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        self.loaded += 1
        return i, self.labels[i]


def books(dataset):
    """The bookkeeping, its order included."""
    first, second, third = (getattr(dataset, name) for name in NAMES)
    return list(first.items()), list(second.items()), third


def tensors(labels):
    labels = torch.tensor(labels)
    return TensorDataset(torch.arange(len(labels)), labels)


@pytest.mark.parametrize(
    "labels",
    [
        [3, 1, 3, 7, 1],
        ["b", "a", "b"],
        [np.int64(4), np.int64(2), np.int64(4)],
        [True, False],
        [torch.tensor(5), torch.tensor([2]), torch.tensor(5)],
        [0.5, -1.0, 0.5],
        [(0, 1), (0, 2)],
    ],
    ids=["ints", "names", "numpy", "bools", "tensors", "floats", "tuples"],
)
def test_as_learn2learn(labels):
    dataset = Counting(labels)
    mine = ours.MetaDataset(dataset)
    assert dataset.loaded == len(labels)
    assert books(mine) == books(theirs.MetaDataset(Counting(labels)))
    assert [type(label) for label in mine.labels] == [
        type(y) for y in theirs.MetaDataset(dataset).labels
    ]
    assert mine[1][0] == 1
    assert len(mine) == len(labels)


def test_samples_of_tensors_are_not_loaded(monkeypatch):
    plain = tensors([2, 2, 5, 0])
    parts = Subset(ConcatDataset([plain, tensors([5, 9])]), [5, 4, 0])
    wanted = [books(theirs.MetaDataset(dataset)) for dataset in (plain, parts)]
    monkeypatch.setattr(torch.Tensor, "__getitem__", None)
    assert [books(ours.MetaDataset(dataset)) for dataset in (plain, parts)] == wanted


def test_what_a_subclass_does_to_labels_counts():
    class Shifted(TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x, y + 10

    dataset = Shifted(torch.arange(3), torch.tensor([0, 1, 0]))
    for wrapped in (dataset, Subset(dataset, [0, 1, 2]), ConcatDataset([dataset])):
        assert ours.MetaDataset(wrapped).labels == [10, 11]


@pytest.mark.parametrize("lib", [theirs, ours], ids=["learn2learn", "fastkfo"])
def test_given_dictionaries(lib):
    dataset = Counting([0] * 4)
    mapping = {8: [0, 3], 5: [1, 2]}
    one = lib.MetaDataset(dataset, mapping)
    assert one.indices_to_labels == {0: 8, 3: 8, 1: 5, 2: 5}
    other = lib.MetaDataset(dataset, indices_to_labels={0: 8, 1: 5, 2: 5, 3: 8})
    assert dict(other.labels_to_indices) == mapping
    assert dataset.loaded == 0


def test_given_dictionaries_count_more_than_a_file(tmp_path):
    dataset = Counting([0] * 2, tmp_path / "books.pkl")
    assert ours.MetaDataset(dataset, {1: [0, 1]}).labels == [1]
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("labels", [[3, 1, 3, 7], ["b", "a", "b"], [None, 1.5, b"x", True]])
def test_a_file_is_written_once_and_read_by_both(tmp_path, labels):
    path = tmp_path / "books.pkl"
    for first, second in ((ours, ours), (ours, theirs), (theirs, ours)):
        path.unlink(missing_ok=True)
        wanted = books(first.MetaDataset(Counting(labels, path)))
        later = Counting(labels, path)
        assert books(second.MetaDataset(later)) == wanted
        assert later.loaded == 0
        assert os.listdir(tmp_path) == ["books.pkl"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps({"labels": [1]}),
        pickle.dumps([1]),
        pickle.dumps({"labels_to_indices": {7: [0]}, "indices_to_labels": {0: 7}, "labels": [7]}),
        pickle.dumps(
            {"labels_to_indices": {7: [0, 1]}, "indices_to_labels": {0: 7, 1: 8}, "labels": [7]}
        ),
        pickle.dumps(
            {"labels_to_indices": {7: [0, 0, 1]}, "indices_to_labels": {0: 7, 1: 7}, "labels": [7]}
        ),
    ],
    ids=["empty", "text", "keys", "list", "too few", "disagreeing", "twice"],
)
def test_a_file_that_does_not_fit_is_made_anew(tmp_path, content):
    path = tmp_path / "books.pkl"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="books.pkl: the bookkeeping kept there does not fit"):
        assert ours.MetaDataset(Counting([1, 2], path)).labels == [1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Counting([1, 2], path)
        assert ours.MetaDataset(again).labels == [1, 2]
    assert again.loaded == 0


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_file_runs_nothing(tmp_path):
    path, target = tmp_path / "books.pkl", tmp_path / "created"
    path.write_bytes(pickle.dumps({"labels": Evil(str(target))}))
    with pytest.raises(ours.UnsafePickleError, match=r"books.pkl: refused.* the name (_?io)\.open"):
        ours.MetaDataset(Counting([1, 2], path))
    assert not target.exists()


def test_where_no_file_can_be_written_a_warning_says_so(tmp_path):
    with pytest.warns(UserWarning, match="the bookkeeping was not kept"):
        assert ours.MetaDataset(Counting([1], tmp_path / "no" / "books.pkl")).labels == [1]
    with pytest.warns(UserWarning, match="labels of type tuple are no plain data"):
        assert ours.MetaDataset(Counting([(1,)], tmp_path / "books.pkl")).labels == [(1,)]
    assert not os.listdir(tmp_path)


def test_unions(tmp_path):
    parts = [[4, 4, 0], ["x", "y"], [0, 4]]
    mine = ours.UnionMetaDataset(
        [Counting(parts[0]), ours.MetaDataset(Counting(parts[1])), Counting(parts[2])]
    )
    yours = theirs.UnionMetaDataset([Counting(part) for part in parts])
    assert books(mine) == books(yours)
    assert [mine[i] for i in range(7)] == [yours[i] for i in range(7)]
    assert len(mine) == len(yours) == 7
    assert mine[-1] == mine[6] == [1, 5]
    assert len(list(mine)) == 7
    for i in (7, -8):
        with pytest.raises(IndexError, match=f"item: expected less than 7, the samples, got {i}"):
            mine[i]
    with pytest.raises(ValueError, match="datasets: expected at least one data set, got none"):
        ours.UnionMetaDataset([])


def test_unions_of_what_the_books_know_in_part():
    part = ours.MetaDataset(Counting([0, 1, 2]), {5: [1]})
    union = ours.UnionMetaDataset([part, Counting([8])])
    assert union.indices_to_labels == {1: 0, 3: 1}
    assert union[3] == [0, 1]


def test_filters():
    labels = [4, 8, 1, 4, 8, 2]
    mine = ours.FilteredMetaDataset(Counting(labels), [8, 4])
    yours = theirs.FilteredMetaDataset(Counting(labels), [8, 4])
    assert books(mine) == books(yours)
    assert (
        [mine[i] for i in range(4)]
        == [yours[i] for i in range(4)]
        == [(1, 8), (4, 8), (0, 4), (3, 4)]
    )
    assert len(mine) == 4
    assert mine.to_true_indices == yours.to_true_indices
    for wrong, message in (
        ([5], "labels of the data set, got 5"),
        ([8, 8], "distinct labels, got 8"),
    ):
        with pytest.raises(ValueError, match=f"labels: expected {message}"):
            ours.FilteredMetaDataset(Counting(labels), wrong)
    assert ours.UnionMetaDataset([mine, mine]).labels == [0, 1, 2, 3]


class Endless(IterableDataset):
    def __iter__(self):
        yield 0, 0


def test_errors():
    for kind, message, dataset in [
        (TypeError, "dataset: expected a torch Dataset, got list", [(0, 1)]),
        (TypeError, "dataset: expected one with a length, got Endless", Endless()),
        (TypeError, r"samples \(data, label\), got int at 0", Subset([3], [0])),
        (ValueError, r"expected scalar labels, got shape \(2,\) at 0", Counting([torch.zeros(2)])),
        (TypeError, "labels that can be keys, got list at 1", Counting([1, [2]])),
    ]:
        with pytest.raises(kind, match=message):
            ours.MetaDataset(dataset)
    with pytest.raises(ValueError, match="labels_to_indices: expected every index once"):
        ours.MetaDataset(Counting([1, 2]), {1: [0, 1], 2: [1]})
    with pytest.raises(ValueError, match="indices_to_labels: expected what labels_to_indices says"):
        ours.MetaDataset(Counting([1, 2]), {1: [0, 1]}, {0: 1, 1: 2})
