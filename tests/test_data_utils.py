"""Support and query, data sets in memory, loops without end: as learn2learn's."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fastkfo import data as ours
from tests.data_oracle import learn2learn_data

theirs = learn2learn_data()


@pytest.mark.parametrize("shots", [1, 2, 3, 4])
@pytest.mark.parametrize("values", [(0, 1, 2), (7, -3, 100), (4,)])
def test_partition(shots, values):
    labels = torch.tensor(values * 4)[torch.randperm(4 * len(values))]
    data = torch.randn(len(labels), 2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for lib in (theirs, ours):
        (x_s, y_s), (x_q, y_q) = lib.partition_task(data, labels, shots=shots)
        gradient = torch.autograd.grad((x_s**2).sum() + (x_q**3).sum(), data)[0]
        found.append([x_s, y_s, x_q, y_q, gradient])
    for mine, yours in zip(*found, strict=True):
        assert torch.equal(mine, yours)
        assert mine.dtype == yours.dtype


def test_partition_of_bad_tasks():
    x, y = torch.randn(6, 2), torch.tensor([0, 0, 1, 1, 2, 2])
    for message, arguments in [
        (r"labels: expected as many samples of each, got \{0: 2, 1: 1\}", (x[:3], y[:3])),
        ("shots: expected 0 to 2, the samples per label, got 3", (x, y, 3)),
        ("shots: expected 0 to 2, the samples per label, got -1", (x, y, -1)),
        (r"labels: expected shape \(6,\), one per sample, got \(5,\)", (x, y[:5])),
        (r"labels: expected shape \(6,\), one per sample, got \(6, 1\)", (x, y[:, None])),
    ]:
        with pytest.raises(ValueError, match=message):
            ours.partition_task(*arguments)


def test_infinite_iterator():
    loader = DataLoader(list(range(5)), batch_size=2)
    endless = ours.InfiniteIterator(loader)
    assert iter(endless) is endless
    assert [next(endless).tolist() for _ in range(5)] == [[0, 1], [2, 3], [4], [0, 1], [2, 3]]
    once = ours.InfiniteIterator(iter([1]))
    assert next(once) == 1
    for empty in (once, ours.InfiniteIterator([])):
        with pytest.raises(ValueError, match="dataloader: expected one with items"):
            next(empty)


class Samples(Dataset):
    _bookkeeping_path = "somewhere.pkl"

    def __init__(self, shapes):
        self.samples = [(torch.full(shape, float(i)), i % 3) for i, shape in enumerate(shapes)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


def test_on_device(device, monkeypatch):
    dataset = Samples([(2, 2)] * 5)
    mine = ours.OnDeviceDataset(dataset, device=device, transform=lambda x: x + 1)
    yours = theirs.OnDeviceDataset(dataset, device=device, transform=lambda x: x + 1)
    for a, b in zip(mine.tensors, yours.tensors, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
        assert a.device.type == device.type
    assert torch.equal(mine[3][0], torch.full((2, 2), 4.0, device=device))
    assert isinstance(mine, TensorDataset)
    assert mine._bookkeeping_path == "somewhere.pkl"
    monkeypatch.setattr(ours.OnDeviceDataset, "__getitem__", None)  # labels need no samples
    assert ours.MetaDataset(mine).labels == [0, 1, 2]


def test_on_device_errors():
    with pytest.raises(TypeError, match="dataset: expected tensors, got int at 0"):
        ours.OnDeviceDataset([(1, 2)])
    with pytest.raises(ValueError, match=r"expected shape \(2,\), .*, got \(3,\) at 1"):
        ours.OnDeviceDataset(Samples([(2,), (3,)]))
    with pytest.raises(ValueError, match="expected at least one sample"):
        ours.OnDeviceDataset(Samples([]))
