"""Episodes from labelled tensors: balance, distinctness, uniformity, rotations, uint8."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastkfo.tasks import FewShotTasks, few_shot
from tests.test_tasks_draws import assert_uniform

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called


def numbered(counts, device="cpu", seed=0):
    """Samples whose only feature is their own number; labels 10, 7, 4, … in random order."""
    labels = torch.cat([torch.full((n,), 10 - 3 * c) for c, n in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    return torch.arange(len(labels), dtype=torch.float32, device=device)[:, None], labels


def check(episodes, labels, ways, shots, queries):
    """What holds for every task."""
    labels = labels.cpu()
    for x_s, y_s, x_q, y_q in zip(*(t.cpu() for t in episodes), strict=True):
        index = torch.cat([x_s, x_q])[:, 0].long()
        assert len(index.unique()) == len(index), "an image was drawn twice"
        y = torch.cat([y_s, y_q])
        classes = [labels[index[y == way]].unique() for way in range(ways)]
        assert all(len(c) == 1 for c in classes), "a label stands for two classes"
        assert len({int(c) for c in classes}) == ways, "two labels stand for one class"
        assert y_s.tolist() == [way for way in range(ways) for _ in range(shots)]
        assert y_q.tolist() == [way for way in range(ways) for _ in range(queries)]


GRID = [
    # images per class, ways, shots, queries, tasks
    ([2], 1, 1, 1, 1),
    ([2, 2], 2, 1, 1, 3),
    ([5, 3, 9], 3, 1, 2, 7),
    ([4, 4, 4, 4], 2, 3, 1, 5),
    ([7, 30, 8, 12, 7], 5, 5, 2, 16),
    ([300, 7, 200], 2, 2, 5, 13),
]


@pytest.mark.parametrize(("counts", "ways", "shots", "queries", "tasks"), GRID)
def test_balanced_and_distinct(counts, ways, shots, queries, tasks, device):
    images, labels = numbered(counts, device)
    episodes = FewShotTasks(images, labels, ways, shots, queries).sample(tasks)
    assert episodes.x_s.shape == (tasks, ways * shots, 1)
    assert episodes.x_q.shape == (tasks, ways * queries, 1)
    assert episodes.y_s.dtype == episodes.y_q.dtype == torch.int64
    assert all(t.device.type == device.type and t.is_contiguous() for t in episodes)
    check(episodes, labels, ways, shots, queries)


@given(data=st.data())
def test_balanced_and_distinct_for_any_sizes(data):
    counts = data.draw(st.lists(st.integers(2, 25), min_size=1, max_size=6))
    ways = data.draw(st.integers(1, len(counts)))
    shots = data.draw(st.integers(1, min(counts) - 1))
    queries = data.draw(st.integers(1, min(counts) - shots))
    images, labels = numbered(counts, seed=data.draw(st.integers(0, 99)))
    check(
        FewShotTasks(images, labels, ways, shots, queries).sample(4), labels, ways, shots, queries
    )


def test_every_ordered_choice_is_as_likely(device):
    images, labels = numbered([3, 2, 5], device)
    episodes = FewShotTasks(images, labels, 2, 1, 1, seed=3).sample(20_000)
    of_class = {int(c): (labels == c).nonzero().squeeze(1).tolist() for c in labels.unique()}
    # A choice of classes is as likely as another one, then a choice of images within them.
    tasks = torch.cat([episodes.x_s, episodes.x_q], 1).squeeze(2).long().cpu()  # s0 s1 q0 q1
    for first, second in itertools.permutations(of_class, 2):
        mine = (labels[tasks[:, 0]] == first) & (labels[tasks[:, 1]] == second)
        assert abs(int(mine.sum()) - 20_000 / 6) < 5 * (20_000 * 5 / 36) ** 0.5
        pairs = [itertools.permutations(of_class[c], 2) for c in (first, second)]
        found = {(a[0], b[0], a[1], b[1]): 0 for a, b in itertools.product(*pairs)}
        for row in tasks[mine].tolist():
            found[tuple(row)] += 1
        if len(found) < 120:  # enough of each
            assert_uniform(torch.tensor(list(found.values())).double(), 1 / len(found))


def test_classes_can_be_chosen():
    images, labels = numbered([4, 4, 4, 4])
    tasks = FewShotTasks(images, labels, 2, 1, 3, classes=[1, 10])
    episodes = tasks.sample(30)
    check(episodes, labels, 2, 1, 3)
    assert set(labels[episodes.x_s.flatten().long()].tolist()) == {1, 10}
    assert tasks.classes == (1, 10)


def test_sorted_labels_give_the_same_as_any_order():
    images, labels = numbered([6, 4, 5])
    order = labels.argsort(stable=True)
    shuffled = FewShotTasks(images, labels, 2, 2, 1, seed=1).sample(9)
    grouped = FewShotTasks(images[order], labels[order], 2, 2, 1, seed=1).sample(9)
    assert all(torch.equal(a, b) for a, b in zip(shuffled, grouped, strict=True))


@pytest.mark.parametrize("mix", [False, True], ids=["distinct", "mixed"])
def test_rotations_are_classes(mix, device):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 2, 5, 5, generator=generator).to(device)
    labels = torch.arange(3).repeat_interleave(4)
    tasks = FewShotTasks(images, labels, 3, 1, 2, rotations=4, mix_rotations=mix, seed=2)
    episodes = tasks.sample(300)
    turned = torch.stack([torch.rot90(images, r, (2, 3)) for r in range(4)])  # [4, 12, 2, 5, 5]
    x = torch.cat([episodes.x_s, episodes.x_q], 1)
    same = (x[:, :, None, None] == turned).flatten(4).all(4)  # [T, S + Q, 4, 12]
    assert (same.flatten(2).sum(2) == 1).all()
    found = same.flatten(2).int().argmax(2).cpu()
    rotation, label = found // 12, labels[found % 12]
    y = torch.cat([episodes.y_s, episodes.y_q], 1).cpu()
    seen, repeats = set(), 0
    for t in range(300):
        classes = []
        for way in range(3):
            pairs = {
                *zip(rotation[t, y[t] == way].tolist(), label[t, y[t] == way].tolist(), strict=True)
            }
            assert len(pairs) == 1, "a class holds two rotations"
            classes += pairs
        assert len(set(classes)) == 3
        repeats += len({c for _, c in classes}) < 3
        seen |= set(classes)
    assert len(seen) == 12
    # Distinct with probability 8/11 * 4/10 if mixed.
    assert repeats == 0 if not mix else abs(repeats / 300 - 1 + 32 / 110) < 0.15


@pytest.mark.parametrize("size", [1, 2, 5])
def test_turns_are_those_of_rot90(size, device):
    x = torch.rand(8, 2, size, size, device=device)
    turns = torch.arange(8, device=device) % 4
    for one, found, r in zip(x, few_shot._turned(x, turns), turns.tolist(), strict=True):
        assert torch.equal(found, torch.rot90(one, r, (1, 2)))


def test_more_ways_than_classes_where_rotations_mix():
    images, labels = torch.rand(4, 1, 3, 3), [0, 0, 1, 1]
    tasks = FewShotTasks(images, labels, 8, 1, 1, rotations=4, mix_rotations=True)
    x = tasks.sample(2).x_s
    assert len(x[0].flatten(1).unique(dim=0)) == 8


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
def test_uint8_is_converted_after_the_draw(dtype, device):
    images = torch.arange(8, dtype=torch.uint8, device=device).mul(30).view(8, 1, 1, 1)
    images = images.expand(-1, 3, 4, 4).contiguous()
    tasks = FewShotTasks(images, [0] * 4 + [1] * 4, 2, 2, 2, dtype=dtype)
    assert tasks._images.dtype == torch.uint8
    x = tasks.sample(1).x_s
    assert x.dtype == (dtype or torch.float32)
    values = (torch.arange(8) * 30).to(dtype or torch.float32) / 255
    assert set(x[0, :, 0, 0, 0].tolist()) <= set(values.tolist())


def test_uint8_and_float_draw_the_same():
    images = torch.randint(256, (10, 3, 6, 6), dtype=torch.uint8)
    labels = [0] * 5 + [1] * 5
    one = FewShotTasks(images, labels, 2, 1, 2, rotations=4, seed=4).sample(6)
    other = FewShotTasks(images.float() / 255, labels, 2, 1, 2, rotations=4, seed=4).sample(6)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_images_are_neither_copied_nor_changed():
    images = torch.rand(8, 1, 2, 2)
    before = images.clone()
    tasks = FewShotTasks(images, [0] * 4 + [1] * 4, 2, 2, 2)
    assert tasks._images.data_ptr() == images.data_ptr()
    tasks.sample(3).x_s.zero_()
    assert torch.equal(images, before)


def test_augment_sees_all_that_was_drawn_and_the_generator():
    seen = []

    def augment(x, generator):
        seen.append((x.shape, generator))
        return x + torch.rand(len(x), 1, generator=generator)

    images, labels = numbered([3, 3])
    tasks = FewShotTasks(images, labels, 2, 1, 2, augment=augment)
    first, second = tasks.sample(5).x_q, tasks.sample(5).x_q
    assert seen == [((5 * 6, 1), tasks._generator)] * 2
    assert (first.frac() > 0).all()
    assert not torch.equal(first.frac(), second.frac())


@pytest.mark.gpu
def test_no_synchronisation():
    images = torch.randint(256, (5 * 400, 3, 8, 8), dtype=torch.uint8, device="cuda")
    labels = torch.arange(5).repeat_interleave(400)
    tasks = FewShotTasks(images, labels, 5, 1, 1, rotations=4)
    tasks.sample(2)
    try:
        torch.cuda.set_sync_debug_mode("error")
        tasks.sample(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
