"""Sinusoids, linear maps and hyperplanes: the formulas, the distributions, bad input."""

import math

import pytest
import torch

from fastkfo.tasks import BinaryClassificationTasks, LinearRegressionTasks, SinusoidTasks

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called

MANY = 4_000


def joined(episodes):
    x = torch.cat([episodes.x_s, episodes.x_q], 1)
    return x, torch.cat([episodes.y_s, episodes.y_q], 1)


def assert_even(values, low, high):
    """Uniform: the largest distance of the empirical distribution, to Kolmogorov's 1e-6."""
    u = ((values.flatten().double() - low) / (high - low)).sort().values.cpu()
    assert u[0] >= 0
    assert u[-1] <= 1
    distance = (u - (torch.arange(len(u)) + 0.5) / len(u)).abs().max()
    assert distance < 2.7 / len(u) ** 0.5


@pytest.mark.parametrize(("shots", "queries", "count"), [(1, 1, 1), (10, 3, 5)])
def test_shapes(shots, queries, count, device):
    for tasks, x, y in (
        (SinusoidTasks(shots, queries, device=device), 1, 1),
        (LinearRegressionTasks(shots, queries, inputs=3, outputs=2, device=device), 3, 2),
    ):
        found = tasks.sample(count)
        assert found.x_s.shape == (count, shots, x)
        assert found.y_s.shape == (count, shots, y)
        assert found.x_q.shape == (count, queries, x)
        assert found.y_q.shape == (count, queries, y)
        assert all(t.is_contiguous() and t.dtype == torch.float32 for t in found)


def waves(x, y):
    """Amplitude and phase of y = a sin(x - p), by least squares on sin x and cos x."""
    basis = torch.cat([x.sin(), x.cos()], 2)
    a = torch.linalg.lstsq(basis, y).solution  # [T, 2, 1]: a cos p, -a sin p
    rest = (basis @ a - y).abs().max()
    return a.norm(dim=1), torch.atan2(-a[:, 1], a[:, 0]), rest


def test_sinusoids(device):
    x, y = joined(SinusoidTasks(5, 5, dtype=torch.float64, device=device).sample(MANY))
    amplitude, phase, rest = waves(x.cpu(), y.cpu())
    assert rest < 1e-9
    assert_even(amplitude, 0.1, 5)
    assert_even(phase, 0, math.pi)
    assert_even(x, -5, 5)


def test_sinusoids_of_other_intervals():
    options = {"amplitude": (2, 3), "phase": (1.0, 1.0), "inputs": (0, 2)}
    x, y = joined(SinusoidTasks(5, 5, dtype=torch.float64, **options).sample(MANY))
    amplitude, phase, rest = waves(x, y)
    assert rest < 1e-9
    assert_even(amplitude, 2, 3)
    assert_even(x, 0, 2)
    assert (phase - 1).abs().max() < 1e-9


def test_linear_maps(device):
    tasks = LinearRegressionTasks(6, 6, inputs=4, outputs=3, dtype=torch.float64, device=device)
    x, y = (t.cpu() for t in joined(tasks.sample(MANY)))
    ones = torch.cat([x, torch.ones(MANY, 12, 1, dtype=torch.float64)], 2)
    solution = torch.linalg.lstsq(ones, y).solution  # [T, 5, 3]
    assert (ones @ solution - y).abs().max() < 1e-8
    for part, variance in ((x, 1), (solution[:, :4], 1 / 4), (solution[:, 4], 1)):
        assert abs(part.mean()) < 5 * (variance / part.numel()) ** 0.5
        assert abs(part.var() / variance - 1) < 5 * (2 / part.numel()) ** 0.5


def test_linear_maps_without_bias_vanish_at_zero():
    tasks = LinearRegressionTasks(2, 2, bias=False, dtype=torch.float64)
    x, y = joined(tasks.sample(50))
    slope = y / x
    assert (slope - slope[:, :1]).abs().max() < 1e-9


@pytest.mark.parametrize("tasks", [SinusoidTasks, LinearRegressionTasks])
def test_noise_is_on_support_and_query(tasks):
    x, y = joined(tasks(2, 3, dtype=torch.float64, noise=0.0, seed=2).sample(MANY))
    noisy_x, noisy_y = joined(tasks(2, 3, dtype=torch.float64, noise=0.3, seed=2).sample(MANY))
    assert torch.equal(x, noisy_x)
    std = (noisy_y - y).std(0)
    assert (std / 0.3 - 1).abs().max() < 0.06


def hyperplanes(tasks, count):
    """What is drawn after x from the same state, and nothing else of it: the true w."""
    state = tasks.state_dict()
    episodes = tasks.sample(count)
    tasks.load_state_dict(state)
    points = episodes.x_s.shape[1] + episodes.x_q.shape[1]
    tasks._normal(count, points, tasks.inputs)
    return episodes, tasks._normal(count, 1, tasks.inputs)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("inputs", [1, 2, 10])
def test_labels_are_sides_of_a_hyperplane(balanced, inputs, device):
    tasks = BinaryClassificationTasks(
        3, 4, inputs=inputs, balanced=balanced, dtype=torch.float64, device=device
    )
    episodes, w = hyperplanes(tasks, 500)
    x, y = joined(episodes)
    assert y.shape == (500, 14)
    assert y.dtype == torch.int64
    assert ((x * w).sum(2).gt(0) == y).all()
    if balanced:
        assert (episodes.y_s == torch.tensor([0] * 3 + [1] * 3, device=device)).all()
        assert (episodes.y_q == torch.tensor([0] * 4 + [1] * 4, device=device)).all()
    else:
        assert abs(y.double().mean() - 0.5) < 5 * 0.5 / y.numel() ** 0.5
        assert y.double().mean(1).std() > 0.1


def test_reflected_points_are_distributed_as_the_others():
    tasks = BinaryClassificationTasks(2, 2, inputs=3, dtype=torch.float64)
    episodes, w = hyperplanes(tasks, MANY)
    x, y = joined(episodes)
    margin = (x * w).sum(2) / w.norm(dim=2)
    for label in (0, 1):  # |N(0, 1)|, and the rest of x still standard normal
        side = margin[y == label].abs()
        assert abs(side.mean() - (2 / math.pi) ** 0.5) < 0.03
        across = x - margin[..., None] * w / w.norm(dim=2, keepdim=True)
        assert abs(across[y == label].square().sum(1).mean() - 2) < 0.1
    assert abs(x.mean()) < 0.03
    assert abs(x.var() - 1) < 0.05


def test_float_labels_are_for_one_logit():
    one = BinaryClassificationTasks(3, 2, seed=1).sample(4)
    other = BinaryClassificationTasks(3, 2, float_labels=True, seed=1).sample(4)
    assert other.y_q.shape == (4, 4, 1)
    assert other.y_q.dtype == torch.float32
    assert torch.equal(other.y_q.squeeze(2).long(), one.y_q)
    assert torch.equal(other.x_q, one.x_q)


BAD = [
    (SinusoidTasks, {"shots": 0}, ValueError, "shots: expected at least 1, got 0"),
    (SinusoidTasks, {"queries": 2.0}, TypeError, "queries: expected an int, got float"),
    (SinusoidTasks, {"amplitude": 3}, TypeError, "amplitude: expected two numbers"),
    (SinusoidTasks, {"phase": (2, 1)}, ValueError, "phase: expected finite numbers with low"),
    (SinusoidTasks, {"inputs": (0, math.inf)}, ValueError, "inputs: expected finite numbers"),
    (SinusoidTasks, {"noise": -1}, ValueError, "noise: expected a finite number of at least 0"),
    (SinusoidTasks, {"noise": "a"}, TypeError, "noise: expected a number, got str"),
    (SinusoidTasks, {"dtype": torch.int64}, TypeError, "dtype: expected a floating torch.dtype"),
    (LinearRegressionTasks, {"inputs": 0}, ValueError, "inputs: expected at least 1, got 0"),
    (LinearRegressionTasks, {"outputs": "2"}, TypeError, "outputs: expected an int, got str"),
    (LinearRegressionTasks, {"bias": 1}, TypeError, "bias: expected a bool, got int"),
    (LinearRegressionTasks, {"seed": None}, TypeError, "seed: expected an int, got NoneType"),
    (BinaryClassificationTasks, {"balanced": 0}, TypeError, "balanced: expected a bool, got int"),
    (BinaryClassificationTasks, {"float_labels": 0}, TypeError, "float_labels: expected a bool"),
    (BinaryClassificationTasks, {"shots": True}, TypeError, "shots: expected an int, got bool"),
]


@pytest.mark.parametrize(("tasks", "options", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_options(tasks, options, error, message):
    with pytest.raises(error, match=message):
        tasks(**options)
