"""Meta-batches drawn ahead: the same tasks, in order, and resumed at any place."""

import copy

import pytest
import torch

from fastkfo.tasks import DigitTasks, DrawAhead, FewShotTasks, SinusoidTasks

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called


def few_shot(device="cpu", seed=0):
    images = torch.arange(90.0, device=device)[:, None]
    return FewShotTasks(images, torch.arange(90) % 9, 3, 2, 3, seed=seed)


MAKE = {
    "few-shot": few_shot,
    "sinusoid": lambda device="cpu", seed=0: SinusoidTasks(3, 2, seed=seed, device=device),
    "digits": lambda device="cpu", seed=0: DigitTasks("train", 2, 1, 1, seed=seed, device=device),
}


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", MAKE)
def test_parts_of_one_draw(name, device):
    tasks, whole = DrawAhead(MAKE[name](device), 3), MAKE[name](device)
    for _ in range(2):
        parts = [tasks.sample(4) for _ in range(3)]
        assert all(t.is_contiguous() and len(t) == 4 for part in parts for t in part)
        assert same([torch.cat(t) for t in zip(*parts, strict=True)], whole.sample(12))


@pytest.mark.parametrize("taken", range(8))
def test_resumed_at_any_place(taken, device):
    tasks = DrawAhead(few_shot(device), 3)
    for _ in range(taken):
        tasks.sample(2)
    state = copy.deepcopy(tasks.state_dict())
    expected = [tasks.sample(2) for _ in range(5)]
    resumed = DrawAhead(few_shot(device, seed=8), 3)
    resumed.sample(5)
    resumed.load_state_dict(state)
    assert all(same(e, resumed.sample(2)) for e in expected)
    tasks.load_state_dict(state)
    assert all(same(e, tasks.sample(2)) for e in expected)


def test_another_number_of_tasks_begins_anew():
    tasks, whole = DrawAhead(few_shot(), 4), few_shot()
    tasks.sample(2)
    found = tasks.sample(3)
    whole.sample(8)
    assert same(found, [t[:3] for t in whole.sample(12)])


GOOD = DrawAhead(few_shot(), 3).state_dict()
BAD = [
    (3, TypeError, "state_dict: expected a mapping, got int"),
    (few_shot().state_dict(), ValueError, "state_dict: expected the keys distribution, batches"),
    ({**GOOD, "batches": 4}, ValueError, r"state_dict\['batches'\]: expected 3, got 4"),
    ({**GOOD, "tasks": 2.0}, TypeError, r"state_dict\['tasks'\]: expected an int, got float"),
    ({**GOOD, "tasks": 2, "taken": 4}, ValueError, "expected a place among 3 .* taken=4"),
    ({**GOOD, "tasks": 2, "taken": 0}, ValueError, "expected a place among 3 .* taken=0"),
    ({**GOOD, "tasks": -2, "taken": 1}, ValueError, "expected a place among 3 .* tasks=-2"),
    ({**GOOD, "distribution": {}}, ValueError, "state_dict: expected the keys generator"),
]


@pytest.mark.parametrize(("state", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_states_change_nothing(state, error, message):
    tasks, untouched = (DrawAhead(few_shot(), 3) for _ in range(2))
    assert same(tasks.sample(2), untouched.sample(2))
    with pytest.raises(error, match=message):
        tasks.load_state_dict(state)
    assert all(same(tasks.sample(2), untouched.sample(2)) for _ in range(4))


def test_bad_options():
    with pytest.raises(TypeError, match="distribution: expected a TaskDistribution, got int"):
        DrawAhead(3)
    with pytest.raises(ValueError, match="batches: expected at least 1, got 0"):
        DrawAhead(few_shot(), 0)
    with pytest.raises(ValueError, match="tasks: expected at least 1, got 0"):
        DrawAhead(few_shot()).sample(0)
