"""Tasks: learn2learn's draws for the same seed, grouped alike; bad input is an error."""

import copy
import inspect
import pickle
import random

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fastkfo import data as ours
from tests.data_oracle import learn2learn_data

theirs = learn2learn_data()


class Labelled(Dataset):
    """Samples (tensor, label) with any labels."""

    def __init__(self, labels):
        self.labels = list(labels)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)
        return torch.tensor([i, i % 7]), self.labels[i]


def shuffled(labels, seed=0):
    labels = list(labels)
    random.Random(seed).shuffle(labels)
    return labels


LABELS = {
    "sorted": [i // 9 for i in range(117)],
    "gaps": shuffled([1000003 * (i % 11) + 5 for i in range(99)]),
    "uneven": shuffled([i for i in range(3, 20) for _ in range(4 + i % 5)]),
    "names": shuffled([f"class {i % 12}" for i in range(108)]),
    "mixed sizes": shuffled([2 ** (i % 13) for i in range(91)]),
}


def steps(lib, dataset, *names):
    """Transforms by short names."""
    t, labels = lib.transforms, sorted(dataset.labels_to_indices)
    make = {
        "ways": lambda: t.NWays(dataset, n=4),
        "2 ways": lambda: t.NWays(dataset, 2),
        "default": lambda: t.NWays(dataset),
        "shots": lambda: t.KShots(dataset, k=3),
        "1 shot": lambda: t.KShots(dataset),
        "again": lambda: t.KShots(dataset, k=6, replacement=True),
        "filter": lambda: t.FilterLabels(dataset, labels[1:9]),
        "fused": lambda: t.FusedNWaysKShots(dataset, n=4, k=3),
        "fused again": lambda: t.FusedNWaysKShots(dataset, n=4, k=6, replacement=True),
        "fused filter": lambda: t.FusedNWaysKShots(dataset, n=3, k=2, filter_labels=labels[2:8]),
        "load": lambda: t.LoadData(dataset),
        "remap": lambda: t.RemapLabels(dataset),
        "keep order": lambda: t.RemapLabels(dataset, shuffle=False),
        "sort": lambda: t.ConsecutiveLabels(dataset),
        "half": lambda: lambda description: description[::2],
    }
    return [make[name]() for name in names]


CHAINS = [
    ("ways", "shots", "load", "remap", "sort"),
    ("ways", "shots", "load", "sort", "remap"),
    ("filter", "ways", "shots", "load", "remap", "sort"),
    ("fused", "load", "remap", "sort"),
    ("fused again", "load", "remap", "sort"),
    ("fused filter", "load", "keep order", "sort"),
    ("filter", "fused filter", "load", "remap"),
    ("shots", "ways", "load", "remap"),
    ("filter", "shots", "ways", "load", "sort"),
    ("ways", "filter", "again", "load", "remap", "sort"),
    ("ways", "2 ways", "1 shot", "load", "remap"),
    ("load", "ways", "again", "remap", "sort"),
    ("filter", "2 ways", "load", "remap"),
    ("default", "load"),
    ("filter", "load", "sort"),
    ("sort", "ways", "shots", "load"),
    ("ways", "half", "2 ways", "1 shot", "load", "remap"),
]


def as_lists(task):
    return [part.tolist() if isinstance(part, torch.Tensor) else list(part) for part in task]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_same_seed_same_tasks(labels, chain):
    found = []
    for lib in (theirs, ours):
        dataset = lib.MetaDataset(Labelled(LABELS[labels]))
        tasks = lib.Taskset(dataset, steps(lib, dataset, *chain))
        random.seed(5)
        found.append([*[as_lists(tasks.sample()) for _ in range(3)], random.random()])
    assert found[0] == found[1]


@pytest.mark.parametrize("chain", CHAINS[:9], ids="-".join)
def test_transforms_called_one_by_one_draw_the_same(chain):
    found = []
    for lib in (theirs, ours):
        dataset = lib.MetaDataset(Labelled(LABELS["gaps"]))
        tasks = lib.Taskset(dataset)
        random.seed(6)
        description = None
        for step in steps(lib, dataset, *chain):
            description = step(description)
            assert type(description) is list
        found.append(as_lists(tasks.get_task(description)))
    assert found[0] == found[1]


@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_given_books_in_any_order(chain):
    labels = LABELS["gaps"]
    books = {
        y: [i for i in range(len(labels)) if labels[i] == y][::-1] for y in sorted(set(labels))
    }
    found = []
    for lib in (theirs, ours):
        dataset = lib.MetaDataset(Labelled(labels), books)
        tasks = lib.Taskset(dataset, steps(lib, dataset, *chain))
        random.seed(8)
        found.append([as_lists(tasks.sample()) for _ in range(3)])
    assert found[0] == found[1]


def test_a_subclass_is_called_as_it_is():
    class Fewer(ours.transforms.NWays):
        def __call__(self, task_description):
            return super().__call__(task_description)[:5]

    dataset = ours.MetaDataset(Labelled(LABELS["sorted"]))
    transforms = [Fewer(dataset, 3), ours.transforms.KShots(dataset, 2)]
    tasks = ours.Taskset(dataset, transforms)
    random.seed(0)
    assert len(tasks.sample_task_description()) == 2  # 5 samples of one class


def test_positions_of_support_and_query():
    dataset = ours.MetaDataset(Labelled(LABELS["gaps"]))
    tasks = ours.Taskset(dataset, steps(ours, dataset, "ways", "again", "load", "remap", "sort"))
    _, y = tasks.sample()
    support = torch.zeros(24, dtype=torch.bool)
    support[torch.arange(3 * 4) * 2] = True
    for part in (y[support], y[~support]):
        assert part.bincount().tolist() == [3] * 4
    assert all([len(set(y[6 * c : 6 * c + 6].tolist())) == 1 for c in range(4)])


def test_names_and_signatures():
    for path in (
        "MetaDataset",
        "UnionMetaDataset",
        "FilteredMetaDataset",
        "Taskset",
        "partition_task",
        "InfiniteIterator",
        "OnDeviceDataset",
        "DataDescription",
        "samplers.TasksetSampler",
        "transforms.NWays",
        "transforms.KShots",
        "transforms.FusedNWaysKShots",
        "utils.partition_task",
        "transforms.FilterLabels",
        "transforms.LoadData",
        "transforms.RemapLabels",
        "transforms.ConsecutiveLabels",
        "transforms.TaskTransform",
        "task_dataset.Taskset",
        "task_dataset.TaskDataset",
        "task_dataset.DataDescription",
        "meta_dataset.MetaDataset",
    ):
        mine, yours = ours, theirs
        for name in path.split("."):
            mine, yours = getattr(mine, name), getattr(yours, name)
        wanted, got = [
            [(p.name, p.default) for p in inspect.signature(c).parameters.values()]
            for c in (yours, mine)
        ]
        assert got == wanted, path


def finite(num_tasks=4, **kwargs):
    dataset = ours.MetaDataset(Labelled(LABELS["sorted"]))
    chain = steps(ours, dataset, "ways", "shots", "load", "remap", "sort")
    return ours.Taskset(dataset, chain, num_tasks=num_tasks, **kwargs)


def test_tasks_of_one_index_are_the_same():
    tasks = finite()
    first = [as_lists(task) for task in tasks]
    assert len(first) == len(tasks) == 4
    assert [as_lists(task) for task in tasks] == first
    assert [as_lists(tasks[i]) for i in (3, 0, -1)] == [first[3], first[0], first[3]]
    assert as_lists(tasks.sample()) in first
    assert len({str(task) for task in first}) == 4
    iter(tasks)
    assert [as_lists(next(tasks)) for _ in range(4)] == first
    with pytest.raises(StopIteration):
        next(tasks)
    with pytest.raises(IndexError, match="i: expected less than 4, the tasks, got 4"):
        tasks[4]


def test_two_iterations_at_once():
    tasks = finite(3)
    assert sum(1 for _ in tasks for _ in tasks) == 9


def test_tasks_without_end_differ():
    tasks = finite(-1)
    assert len(tasks) == 1
    assert as_lists(tasks[0]) != as_lists(tasks[0])
    assert len([task for task, _ in zip(tasks, range(5), strict=False)]) == 5
    assert as_lists(next(tasks)) != as_lists(next(tasks))
    assert tasks.sampled_descriptions == {}


def test_finite_tasks_are_learn2learns():
    found = []
    for lib in (theirs, ours):
        dataset = lib.MetaDataset(Labelled(LABELS["sorted"]))
        chain = steps(lib, dataset, "ways", "shots", "load", "remap", "sort")
        tasks = lib.Taskset(dataset, chain, num_tasks=5)
        random.seed(1)
        found.append([as_lists(task) for task in [tasks.sample(), *tasks, tasks.sample()]])
    assert found[0] == found[1]


def test_collate_functions_and_whole_data_sets():
    tasks = finite(task_collate=lambda samples: [y for _, y in samples])
    assert sorted(tasks[0]) == sorted([0, 1, 2, 3] * 3)
    assert ours.Taskset(Labelled([1, 1, 0])).sample().tolist() == [0, 1, 2]
    dataset = ours.MetaDataset(Labelled([1, 1, 0]))
    one = ours.Taskset(dataset, lambda description: ours.transforms.LoadData(dataset)(description))
    assert one.sample()[1].tolist() == [1, 1, 0]
    with pytest.warns(DeprecationWarning, match="TaskDataset is deprecated"):
        older = ours.TaskDataset(dataset)
    assert isinstance(older, ours.Taskset)


def test_labels_that_are_tensors():
    dataset = ours.MetaDataset(
        TensorDataset(torch.randn(8, 2), torch.tensor([4, 4, 4, 4, 9, 9, 9, 9]))
    )
    chain = steps(ours, dataset, "default", "1 shot", "load", "remap", "sort")
    assert sorted(ours.Taskset(dataset, chain).sample()[1].tolist()) == [0, 1]


def test_they_pickle_and_copy_without_the_data_set():
    tasks = finite(2)
    first = as_lists(tasks[0])
    other = pickle.loads(pickle.dumps(tasks))
    assert as_lists(other[0]) == first
    described = tasks.sampled_descriptions[0][0]
    copied = copy.deepcopy(described)
    assert copied.transforms == described.transforms
    assert copied.transforms is not described.transforms
    assert copied.index == described.index


def test_worker_processes_draw():
    loader = DataLoader(finite(4), batch_size=None, num_workers=1)
    assert len([y for _, y in loader]) == 4


def test_the_sampler_of_a_data_loader():
    found = []
    for lib in (theirs, ours):
        dataset = lib.MetaDataset(Labelled(LABELS["sorted"]))
        tasks = lib.Taskset(dataset, steps(lib, dataset, "fused", "load", "sort"), num_tasks=3)
        for shuffle in (True, False):
            random.seed(2)
            sampler = lib.samplers.TasksetSampler(tasks, shuffle=shuffle)
            found.append(list(sampler))
        endless = lib.Taskset(dataset, steps(lib, dataset, "fused"))
        found.append(next(iter(lib.samplers.TasksetSampler(endless))))
    assert found[:3] == found[3:]
    assert len(sampler) == 3
    batches = DataLoader(dataset, batch_sampler=sampler)
    assert [y.tolist() for _, y in batches] == [task[1].tolist() for task in tasks]


def test_errors_of_transforms():
    dataset = ours.MetaDataset(Labelled(LABELS["uneven"]))  # 17 labels, 4 to 8 samples
    t = ours.transforms
    cases = [
        (
            ValueError,
            r"n: expected at most 17, the labels there are, got 18",
            lambda: t.NWays(dataset, 18),
        ),
        (ValueError, "n: expected at least 1, got 0", lambda: t.NWays(dataset, 0)),
        (TypeError, "n: expected an int, got float", lambda: t.NWays(dataset, 2.0)),
        (TypeError, "k: expected an int, got bool", lambda: t.KShots(dataset, True)),
        (ValueError, "k: expected at least 1, got -1", lambda: t.FusedNWaysKShots(dataset, 2, -1)),
        (
            ValueError,
            r"filter_labels: expected labels of .*, got \[99\]",
            lambda: t.FusedNWaysKShots(dataset, filter_labels=[3, 99]),
        ),
        (
            ValueError,
            r"filter_labels: expected distinct labels, got \[3, 3\]",
            lambda: t.FusedNWaysKShots(dataset, filter_labels=[3, 3]),
        ),
        (
            ValueError,
            "n: expected at most 2",
            lambda: t.FusedNWaysKShots(dataset, 3, filter_labels=[3, 4]),
        ),
        (
            ValueError,
            r"labels: expected labels of the data set, got \['a'\]",
            lambda: t.FilterLabels(dataset, ["a"]),
        ),
        (
            TypeError,
            "dataset: expected a MetaDataset, got Labelled",
            lambda: t.LoadData(dataset.dataset),
        ),
        (TypeError, "index: expected an int, got str", lambda: ours.DataDescription("0")),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def test_too_few_are_errors_when_drawn():
    dataset = ours.MetaDataset(Labelled(LABELS["uneven"]))
    t = ours.transforms
    message = r"k: expected at most \d, the samples of label \d+ \(or replacement=True\), got 9"
    for chain in (
        [t.NWays(dataset, 17), t.KShots(dataset, 9)],
        [t.FusedNWaysKShots(dataset, 2, 9)],
        [t.LoadData(dataset), t.KShots(dataset, 9)],
    ):
        with pytest.raises(ValueError, match=message):
            ours.Taskset(dataset, chain).sample()
    with pytest.raises(ValueError, match="n: expected at most 2, the labels there are, got 3"):
        ours.Taskset(dataset, [t.FilterLabels(dataset, [3, 4]), t.NWays(dataset, 3)]).sample()
    again = t.FusedNWaysKShots(dataset, 2, 9, replacement=True)
    assert len(ours.Taskset(dataset, [again]).sample()) == 18


def test_errors_of_tasksets():
    dataset = ours.MetaDataset(Labelled(LABELS["sorted"]))
    for kind, message, kwargs in [
        (ValueError, "num_tasks: expected -1 .* got 0", {"num_tasks": 0}),
        (ValueError, "num_tasks: .* got -2", {"num_tasks": -2}),
        (TypeError, "num_tasks: expected an int, got float", {"num_tasks": 2.0}),
        (
            TypeError,
            r"task_transforms\[0\]: expected a function, got int",
            {"task_transforms": [3]},
        ),
        (TypeError, "task_transforms: expected a function, got int", {"task_transforms": 3}),
        (TypeError, "task_collate: expected a function, got str", {"task_collate": "stack"}),
    ]:
        with pytest.raises(kind, match=message):
            ours.Taskset(dataset, **kwargs)
    with pytest.raises(ValueError, match="expected a task with samples, got one without"):
        ours.Taskset(dataset, lambda description: []).sample()
    with pytest.raises(TypeError, match="expected lists of DataDescription from them, got int"):
        ours.Taskset(dataset, lambda description: 3).sample()
    with pytest.raises(NotImplementedError):
        finite() + finite()
    other = ours.MetaDataset(Labelled(["a"] * len(dataset)))
    chain = [ours.transforms.LoadData(other), ours.transforms.RemapLabels(dataset)]
    with pytest.raises(ValueError, match=r"expected one of the task's labels .* got 'a'"):
        ours.Taskset(dataset, chain).sample()
