"""Augmentations of a batch against a loop over its images, with what was drawn replayed."""

import pytest
import torch
import torch.nn.functional as F

from fastkfo.tasks.augmentations import (
    ColorJitter,
    Compose,
    HorizontalFlip,
    Normalize,
    RandomCrop,
)

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called

SHAPES = [(1, 1, 1, 1), (7, 3, 5, 4), (40, 1, 6, 9)]


def images(shape, device, dtype=torch.float64):
    return torch.rand(shape, dtype=dtype).to(device)


def generators(device):
    """The one that is used, and one to replay it."""
    return [torch.Generator(device).manual_seed(5) for _ in range(2)]


def uniform(b, generator, dtype=torch.float32):
    return torch.rand(b, 1, 1, 1, generator=generator, dtype=dtype, device=generator.device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("padding", [1, 3])
def test_crop(shape, padding, device):
    x, (used, replay) = images(shape, device), generators(device)
    y = RandomCrop(padding, fill=-1.0)(x, used)
    places = torch.randint(2 * padding + 1, (2, len(x)), generator=replay, device=device)
    for one, found, top, left in zip(x, y, *places.tolist(), strict=True):
        padded = F.pad(one, [padding] * 4, value=-1.0)
        expected = padded[:, top : top + shape[2], left : left + shape[3]]
        assert torch.equal(found, expected)


def test_crop_reaches_every_place():
    x = torch.zeros(500, 1, 3, 3)
    x[:, :, 1, 1] = 1
    y = RandomCrop(1)(x, torch.Generator())
    places = y.flatten(1).argmax(1)
    assert set(places.tolist()) == set(range(9))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_flip(shape, p, device):
    x, (used, replay) = images(shape, device), generators(device)
    y = HorizontalFlip(p)(x, used)
    for one, found, u in zip(x, y, uniform(len(x), replay).flatten().tolist(), strict=True):
        assert torch.equal(found, one.flip(2) if u < p else one)


def test_flip_flips_as_often_as_it_should():
    x = torch.tensor([0.0, 1.0]).expand(4_000, 1, 1, 2)
    flipped = HorizontalFlip(0.3)(x, torch.Generator())[..., 0].mean()
    assert abs(flipped - 0.3) < 5 * (0.21 / 4_000) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_normalize(dtype, device):
    x = images((5, 3, 4, 4), device, dtype)
    normalize = Normalize((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    for _ in range(2):
        y = normalize(x, torch.Generator(device))
        assert y.dtype == dtype
        for c, (mean, std) in enumerate(((0.1, 0.5), (0.2, 1.0), (0.3, 2.0))):
            torch.testing.assert_close(y[:, c], (x[:, c] - mean) / std)
        y = normalize(x.float(), torch.Generator(device))  # the same object, another dtype
        assert y.dtype == torch.float32


def grey(one):
    return one if len(one) == 1 else 0.299 * one[:1] + 0.587 * one[1:2] + 0.114 * one[2:]


@pytest.mark.parametrize(
    ("shape", "strengths"),
    [
        ((6, 3, 4, 5), (0.5, 0.0, 0.0)),
        ((6, 3, 4, 5), (0.0, 0.5, 0.0)),
        ((6, 3, 4, 5), (0.0, 0.0, 1.5)),
        ((6, 3, 4, 5), (0.4, 0.3, 0.2)),
        ((6, 1, 4, 5), (0.4, 2.0, 0.0)),
    ],
    ids=str,
)
def test_jitter(shape, strengths, device):
    x, (used, replay) = images(shape, device), generators(device)
    y = ColorJitter(*strengths)(x, used)
    factors = []
    for v in strengths:
        u = uniform(len(x), replay, x.dtype).flatten().tolist() if v else [None] * len(x)
        low = max(0.0, 1 - v)
        factors.append([None if n is None else low + n * (1 + v - low) for n in u])
    for one, found, brightness, contrast, saturation in zip(x, y, *factors, strict=True):
        if brightness is not None:
            one = (one * brightness).clamp(0, 1)
        if contrast is not None:
            mean = grey(one).mean()
            one = (mean + contrast * (one - mean)).clamp(0, 1)
        if saturation is not None:
            one = (grey(one) + saturation * (one - grey(one))).clamp(0, 1)
        torch.testing.assert_close(found, one)


@pytest.mark.parametrize(
    "augment",
    [
        RandomCrop(2),
        HorizontalFlip(),
        ColorJitter(0.3, 0.3, 0.3),
        Normalize((0.5,), (0.2,)),
        Compose(),
        Compose(RandomCrop(1), HorizontalFlip(0.5), ColorJitter(0.2), Normalize((0.5,), (0.1,))),
    ],
    ids=lambda a: type(a).__name__,
)
def test_input_and_global_generator_are_left_alone(augment, device):
    x = images((5, 3, 4, 4), device, torch.float32)
    before, state = x.clone(), torch.get_rng_state()
    y = augment(x, torch.Generator(device))
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert torch.equal(x, before)
    assert torch.equal(state, torch.get_rng_state())


def test_compose_is_one_after_the_other(device):
    x, (used, replay) = images((9, 3, 4, 4), device), generators(device)
    crop, flip = RandomCrop(1), HorizontalFlip()
    assert torch.equal(Compose(crop, flip)(x, used), flip(crop(x, replay), replay))


BAD = [
    (lambda: RandomCrop(0), ValueError, "padding: expected at least 1, got 0"),
    (lambda: RandomCrop(1.5), TypeError, "padding: expected an int, got float"),
    (lambda: HorizontalFlip(1.1), ValueError, "p: expected at most 1, got 1.1"),
    (lambda: HorizontalFlip(-0.1), ValueError, "p: expected a finite number of at least 0"),
    (lambda: ColorJitter(contrast=-1), ValueError, "contrast: expected a finite number"),
    (lambda: ColorJitter("a"), TypeError, "brightness: expected a number, got str"),
    (lambda: Normalize((0.5,), (0.1, 0.2)), ValueError, "std: expected as many numbers"),
    (lambda: Normalize((0.5,), (0.0,)), ValueError, "std: expected positive numbers"),
    (lambda: Compose(RandomCrop(1), 3), TypeError, r"augmentations\[1\]: expected a callable"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("augment", "shape", "message"),
    [
        (RandomCrop(1), (3, 4), r"images: expected floating \[B, C, H, W\]"),
        (Normalize((1.0, 1.0), (1.0, 1.0)), (2, 3, 4, 4), "images: expected 2 channels, .* got 3"),
        (ColorJitter(saturation=0.1), (2, 1, 4, 4), "images: expected 3 channels, got 1"),
        (ColorJitter(0.1), (2, 2, 4, 4), "images: expected 1 or 3 channels, got 2"),
    ],
)
def test_bad_images(augment, shape, message):
    with pytest.raises(ValueError, match=message):
        augment(torch.rand(shape), torch.Generator())
