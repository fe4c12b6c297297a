"""What holds for every distribution: seeds, state, the global generator, training on what comes."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.tasks import (
    BinaryClassificationTasks,
    DigitTasks,
    Episodes,
    FewShotTasks,
    LinearRegressionTasks,
    SinusoidTasks,
    TaskDistribution,
)
from fastkfo.tasks.augmentations import Compose, HorizontalFlip, RandomCrop

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called


def few_shot(**options):
    images = torch.randint(256, (60, 3, 6, 6), dtype=torch.uint8)
    augment = Compose(RandomCrop(1), HorizontalFlip())
    labels = torch.arange(6).repeat(10)
    return FewShotTasks(images, labels, 3, 2, 3, rotations=4, augment=augment, **options)


DISTRIBUTIONS = {
    "sinusoid": lambda **o: SinusoidTasks(4, 6, noise=0.1, **o),
    "linear": lambda **o: LinearRegressionTasks(4, 6, inputs=3, outputs=2, noise=0.1, **o),
    "binary": lambda **o: BinaryClassificationTasks(4, 6, **o),
    "digits": lambda **o: DigitTasks("train", 3, 2, 4, **o),
    "few-shot": few_shot,
}


@pytest.fixture(params=DISTRIBUTIONS)
def make(request, device):
    def build(**options):
        torch.manual_seed(0)  # the data
        return DISTRIBUTIONS[request.param](device=device, **options)

    return build


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_seeds(make, device):
    first, again, other = make(seed=3), make(seed=3), make(seed=4)
    state = torch.get_rng_state()
    a, b = first.sample(3), first.sample(3)
    assert isinstance(first, TaskDistribution)
    assert isinstance(a, Episodes)
    assert all(t.device.type == device.type for t in a)
    assert same(a, again.sample(3))
    assert same(b, again.sample(3))
    assert not torch.equal(a.x_s, b.x_s)
    assert not torch.equal(a.x_s, other.sample(3).x_s)
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"


def test_resumed_bit_for_bit(make, device):
    tasks = make(seed=1)
    tasks.sample(5)
    file = io.BytesIO()
    torch.save(tasks.state_dict(), file)
    expected = [tasks.sample(n) for n in (2, 7)]
    file.seek(0)
    state = torch.load(file, weights_only=True, map_location=device)
    resumed = make(seed=99)
    resumed.load_state_dict(state)
    assert all(same(e, resumed.sample(n)) for e, n in zip(expected, (2, 7), strict=True))


def test_a_state_is_a_copy(make):
    tasks = make()
    state = tasks.state_dict()
    first = tasks.sample(2)
    tasks.load_state_dict(state)
    assert same(first, tasks.sample(2))


STATE = torch.Generator().get_state()
BAD = [
    (3, TypeError, "state_dict: expected a mapping, got int"),
    ({}, ValueError, "state_dict: expected the keys generator and device"),
    ({"generator": STATE}, ValueError, "state_dict: expected the keys"),
    ({"generator": 3, "device": "cpu"}, TypeError, "expected a uint8 tensor, got int"),
    ({"generator": STATE.float(), "device": "cpu"}, TypeError, "got torch.float32"),
    ({"generator": STATE[:16], "device": "cuda"}, ValueError, "expected 'cpu', .* got 'cuda'"),
    ({"generator": STATE[:16], "device": "cpu"}, ValueError, r"expected shape \[\d+\], got \[16\]"),
    ({"generator": STATE * 0 + 255, "device": "cpu"}, ValueError, "expected a state"),
]


@pytest.mark.parametrize(("state", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_states(state, error, message):
    tasks, untouched = SinusoidTasks(seed=5), SinusoidTasks(seed=5)
    with pytest.raises(error, match=message):
        tasks.load_state_dict(state)
    assert same(tasks.sample(2), untouched.sample(2))


@pytest.mark.gpu
def test_a_state_of_another_device_is_refused():
    with pytest.raises(ValueError, match=r"expected 'cuda', .* got 'cpu'"):
        SinusoidTasks(device="cuda").load_state_dict(SinusoidTasks().state_dict())
    # Digits are drawn on the CPU, whatever the device.
    digits = DigitTasks(device="cuda")
    digits.load_state_dict(DigitTasks(seed=3).state_dict())
    assert torch.equal(digits.sample(2).x_s.cpu(), DigitTasks(seed=3).sample(2).x_s)


@pytest.mark.parametrize(
    ("name", "model", "loss"),
    [
        ("sinusoid", nn.Linear(1, 1), F.mse_loss),
        ("linear", nn.Linear(3, 2), F.mse_loss),
        ("binary", nn.Linear(10, 2), F.cross_entropy),
        ("digits", nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), F.cross_entropy),
        ("few-shot", nn.Sequential(nn.Flatten(), nn.Linear(108, 3)), F.cross_entropy),
    ],
)
def test_inner_loop_takes_what_comes(name, model, loss):
    inner_loop = fastkfo.InnerLoop(fastkfo.algorithms.MAML(model, lr=0.1), loss, steps=1)
    found = inner_loop(*DISTRIBUTIONS[name]().sample(4)).loss
    found.mean().backward()
    assert found.shape == (4,)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
