"""What FewShotTasks refuses, and how it says so."""

import numpy as np
import pytest
import torch

from fastkfo.tasks import FewShotTasks

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called

IMAGES = torch.rand(10, 1, 4, 4)
LABELS = [3, 3, 3, 3, 8, 8, 8, 8, 8, 8]


def make(images=IMAGES, labels=LABELS, ways=2, shots=1, queries=2, **options):
    return FewShotTasks(images, labels, ways, shots, queries, **options)


BAD = [
    ({"ways": 3}, ValueError, "ways: expected at most 2, the classes there are, got 3"),
    ({"ways": 0}, ValueError, "ways: expected at least 1, got 0"),
    ({"shots": 1.0}, TypeError, "shots: expected an int, got float"),
    ({"queries": True}, TypeError, "queries: expected an int, got bool"),
    (
        {"shots": 2, "queries": 3},
        ValueError,
        r"shots \+ queries: expected at most 4, the images of class 3, got 2 \+ 3 = 5",
    ),
    ({"images": [1, 2]}, TypeError, "images: expected a tensor, got list"),
    ({"images": IMAGES.long()}, TypeError, "images: expected a floating dtype or uint8"),
    ({"images": IMAGES[:0], "labels": []}, ValueError, "images: expected .* some size"),
    ({"labels": LABELS[:9]}, ValueError, "labels: expected 10, one per image, got 9"),
    ({"labels": torch.rand(10)}, TypeError, "labels: expected integers, got torch.float32"),
    ({"labels": torch.ones(10).bool()}, TypeError, "labels: expected integers, got torch.bool"),
    ({"labels": "aaaaaaaaaa"}, TypeError, "labels: expected integers, got str"),
    ({"labels": torch.ones(10, 1).long()}, ValueError, r"labels: expected \[N\], got shape"),
    ({"classes": []}, ValueError, "classes: expected at least one, got none"),
    ({"classes": [3, 3]}, ValueError, "classes: expected distinct labels"),
    ({"classes": [3, 4]}, ValueError, r"classes: expected labels with images, got \[4\]"),
    ({"classes": [3.5, 8]}, TypeError, r"classes: expected integers, got \[3.5, 8\]"),
    ({"rotations": 2}, ValueError, "rotations: expected 1 or 4, got 2"),
    ({"rotations": 4.0}, TypeError, "rotations: expected an int, got float"),
    ({"images": IMAGES[..., :3], "rotations": 4}, ValueError, r"images: expected \[N, C, H, H\]"),
    ({"mix_rotations": 1}, TypeError, "mix_rotations: expected a bool, got int"),
    ({"augment": 3}, TypeError, "augment: expected a callable, got int"),
    ({"seed": 0.5}, TypeError, "seed: expected an int, got float"),
    ({"seed": -1}, ValueError, r"seed: expected 0 to 2\*\*63 - 1, got -1"),
    ({"seed": 2**63}, ValueError, "seed: expected 0 to .* got 9223372036854775808"),
    ({"device": "foo"}, ValueError, "device: expected a device that PyTorch sees, got 'foo'"),
    ({"device": "cuda:99"}, ValueError, "device: expected a device .* got 'cuda:99'"),
    ({"device": 1.5}, TypeError, "device: expected a device, got float"),
    ({"dtype": torch.uint8}, TypeError, "dtype: expected a floating torch.dtype"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize(("count", "error"), [(0, ValueError), (1.0, TypeError), (True, TypeError)])
def test_bad_number_of_tasks(count, error):
    tasks = make()
    before = tasks.state_dict()["generator"]
    with pytest.raises(error, match="tasks: expected"):
        tasks.sample(count)
    assert torch.equal(before, tasks.state_dict()["generator"])


@pytest.mark.parametrize("back", [lambda x, _: x[1:], lambda x, _: None, lambda x, _: x.sum()])
def test_augment_must_give_every_image_back(back):
    with pytest.raises(ValueError, match=r"augment: expected \[6, ...\] back"):
        make(augment=back).sample(1)


@pytest.mark.parametrize(
    "labels",
    [LABELS, tuple(LABELS), np.array(LABELS), torch.tensor(LABELS, dtype=torch.uint8)],
    ids=["list", "tuple", "array", "uint8"],
)
def test_labels_of_any_integer_kind(labels):
    assert make(labels=labels).classes == (3, 8)


def test_negative_labels():
    assert make(labels=[-1] * 5 + [4] * 5).classes == (-1, 4)


def test_images_that_want_gradients_are_data():
    assert not make(images=IMAGES.clone().requires_grad_()).sample(1).x_s.requires_grad
