"""Episodes from scikit-learn's digits: shapes, balance, splits, seeds, bad input."""

import pytest
import torch
from sklearn.datasets import load_digits

from fastkfo.tasks import DigitTasks, Episodes
from fastkfo.tasks.digits import SPLITS

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called

SPLIT_NAMES = tuple(SPLITS)


def identify(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds every image among the data set's at four rotations: its index, and the rotation."""
    images = torch.from_numpy(load_digits().images)
    train = torch.from_numpy(load_digits().target) < 5
    images = (images - images[train].mean()) / images[train].std()
    table = torch.stack([torch.rot90(images, r, (1, 2)) for r in range(4)]).flatten(2)  # [4, N, 64]
    distance = torch.cdist(x.double().flatten(1)[None].expand(4, -1, -1), table)  # [4, S, N]
    best = distance.permute(1, 0, 2).flatten(1).argmin(1)
    assert distance.amin((0, 2)).max() < 1e-5
    return best % len(images), best // len(images)


@pytest.mark.parametrize("split", SPLIT_NAMES)
@pytest.mark.parametrize(
    ("ways", "shots", "queries", "count"), [(5, 5, 15, 3), (2, 1, 3, 7), (3, 20, 1, 1)]
)
def test_shapes_dtypes_and_balance(split, ways, shots, queries, count):
    tasks = DigitTasks(split, ways, shots, queries).sample(count)
    assert isinstance(tasks, Episodes)
    assert tasks.x_s.shape == (count, ways * shots, 1, 8, 8)
    assert tasks.x_q.shape == (count, ways * queries, 1, 8, 8)
    assert tasks.y_s.shape == (count, ways * shots)
    assert tasks.y_q.shape == (count, ways * queries)
    assert tasks.x_s.dtype == tasks.x_q.dtype == torch.float32
    assert tasks.y_s.dtype == tasks.y_q.dtype == torch.int64
    for y, per_class in ((tasks.y_s, shots), (tasks.y_q, queries)):
        for row in y:
            assert row.bincount().tolist() == [per_class] * ways


@pytest.mark.parametrize("split", SPLIT_NAMES)
def test_classes_and_images_are_what_the_split_says(split):
    targets = torch.from_numpy(load_digits().target)
    tasks = DigitTasks(split, 3, 2, 4, seed=5).sample(20)
    rotations = set()
    for x_s, y_s, x_q, y_q in zip(*tasks, strict=True):
        index, rotation = identify(torch.cat([x_s, x_q]))
        assert len(index.unique()) == len(index), "an image was drawn twice"
        y = torch.cat([y_s, y_q])
        digits = [targets[index[y == label]].unique() for label in range(3)]
        assert all(len(d) == 1 for d in digits), "a class holds two digits"
        assert len({int(d) for d in digits}) == 3, "two classes hold one digit"
        assert {int(d) for d in digits} <= set(SPLITS[split])
        if split == "train":  # a rotated 0 may well equal another image: look at 2, 3 and 4 only
            for label in range(3):
                if digits[label] > 1:
                    turned = rotation[y == label].unique()
                    assert len(turned) == 1, "a class holds two rotations"
                    rotations.add(int(turned))
        else:
            assert (rotation == 0).all()
    if split == "train":
        assert rotations == {0, 1, 2, 3}


def test_splits_share_nothing():
    assert not set(SPLITS["train"]) & set(SPLITS["test"])
    seen = {}
    for split in ("valid", "test"):
        tasks = DigitTasks(split, 5, 5, 15).sample(40)
        seen[split] = set(identify(torch.cat([tasks.x_s, tasks.x_q], 1).flatten(0, 1))[0].tolist())
    assert not seen["valid"] & seen["test"]


def test_every_set_and_order_of_classes_comes_up():
    targets = torch.from_numpy(load_digits().target)
    tasks = DigitTasks("test", 2, 1, 1, seed=1).sample(400)
    index, _ = identify(tasks.x_s.flatten(0, 1))
    pairs = {tuple(row) for row in targets[index].view(-1, 2).tolist()}
    assert len(pairs) == 5 * 4


def test_unit_variance():
    x = DigitTasks("train", 5, 20, 100, dtype=torch.float64).sample(20).x_q
    assert x.dtype == torch.float64
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01


def test_seeds():
    def draw(seed):
        tasks = DigitTasks("train", seed=seed)
        return tasks.sample(2), tasks.sample(2)

    state = torch.get_rng_state()
    first, second = draw(3)
    again, _ = draw(3)
    other, _ = draw(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.x_s, second.x_s)
    assert not torch.equal(first.x_s, other.x_s)
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"


def test_digits_can_be_chosen():
    targets = torch.from_numpy(load_digits().target)
    tasks = DigitTasks("test", 2, 3, 3, digits=(0, 9)).sample(5)
    index, _ = identify(tasks.x_s.flatten(0, 1))
    assert set(targets[index].tolist()) == {0, 9}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"split": "dev"}, ValueError, "split: expected one of train, valid, test, got 'dev'"),
        ({"ways": 6}, ValueError, "ways: expected at most 5.* got 6"),
        ({"ways": 0}, ValueError, "ways: expected at least 1, got 0"),
        ({"ways": 2.0}, TypeError, "ways: expected an int, got float"),
        ({"shots": True}, TypeError, "shots: expected an int, got bool"),
        ({"queries": -1}, ValueError, "queries: expected at least 1, got -1"),
        (
            {"split": "test", "shots": 80, "queries": 20},
            ValueError,
            r"shots \+ queries: expected at most \d+, .* got 80 \+ 20 = 100",
        ),
        ({"seed": None}, TypeError, "seed: expected an int, got NoneType"),
        ({"dtype": torch.int64}, TypeError, "dtype: expected a floating torch.dtype"),
        ({"digits": (1, 1, 2)}, ValueError, "digits: expected distinct digits"),
        ({"digits": (1, 10)}, ValueError, "digits: expected distinct digits"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        DigitTasks(**options)


@pytest.mark.parametrize(("count", "error"), [(0, ValueError), (1.0, TypeError)])
def test_bad_number_of_tasks(count, error):
    with pytest.raises(error, match="tasks: expected"):
        DigitTasks().sample(count)


@pytest.mark.parametrize("split", SPLIT_NAMES)
def test_draws_stay_what_they_are(split):
    """The formula of the first version, so that recorded trainings can be repeated."""
    shots, queries, ways = 2, 3, 4
    digits = load_digits()
    images, targets = torch.from_numpy(digits.images), torch.from_numpy(digits.target)
    train = targets < 5
    images = ((images - images[train].mean()) / images[train].std()).float()
    tasks = DigitTasks(split, ways, shots, queries, seed=11)
    generator = torch.Generator().manual_seed(11)
    members = [(targets == digit).nonzero().squeeze(1) for digit in SPLITS[split]]
    if split != "train":
        halves = [len(m) // 2 for m in members]
        members = [
            m[:h] if split == "valid" else m[h:] for m, h in zip(members, halves, strict=True)
        ]
    members = torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=-1)
    for count in (1, 6):
        rows = torch.rand(count, 5, generator=generator).argsort(1)[:, :ways]
        turns = torch.randint(4 if split == "train" else 1, (count, ways), generator=generator)
        pool = members[rows]
        keys = torch.rand(pool.shape, generator=generator).masked_fill(pool < 0, 2.0)
        chosen = pool.gather(2, keys.argsort(2)[..., : shots + queries])
        found = tasks.sample(count)
        for t in range(count):
            for way in range(ways):
                own = torch.rot90(images[chosen[t, way]], int(turns[t, way]), (1, 2))
                own = own.unsqueeze(1)
                assert torch.equal(found.x_s[t, way * shots : (way + 1) * shots], own[:shots])
                assert torch.equal(found.x_q[t, way * queries : (way + 1) * queries], own[shots:])
