"""Evaluation: the scores of a loop that anyone would write, intervals, nothing moves."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastkfo.training import Trainer, evaluate, interval
from fastkfo.training.evaluation import Evaluation, measure
from fastkfo.training.methods import build
from fastkfo.training.sources import load
from fastkfo.training.statistics import Interval
from tests.training_cases import same, small


def prepared(**options):
    config = small("x", **({"dtype": "float64", "fast_lr": 0.5} | options))
    problem = load(config, ("test",))
    return config, problem, build(config, problem.shape, problem.outputs, problem.regression)


def measured(config, problem, built, count=5, **options):
    options = {"steps": config.steps, "chunk": 2, "regression": problem.regression} | options
    return measure(built, problem.tasks["test"], count, **options)


def by_hand(config, problem, built, count, score):
    """Scores after and before, task after task."""
    found = []
    for x_s, y_s, x_q, y_q in zip(*problem.tasks["test"].sample(count), strict=True):
        learner = built.learner.clone()
        before = score(learner(x_q), y_q)
        for _ in range(config.steps):
            loss = F.mse_loss if problem.regression else F.cross_entropy
            learner.adapt(loss(learner(x_s), y_s))
        found.append([score(learner(x_q), y_q).item(), before.item()])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("dataset", ["digits", "sinusoid"])
def test_scores_are_those_of_a_loop(dataset):
    options = {"dataset": dataset, "backbone": "mlp-8", "method": "maml-kfo"}
    found = measured(*prepared(**options))

    def accuracy(predictions, y):
        return (predictions.argmax(-1) == y).double().mean()

    expected = by_hand(*prepared(**options), 5, accuracy if dataset == "digits" else F.mse_loss)
    assert found.after.mean == pytest.approx(expected[:, 0].mean().item(), rel=1e-9)
    assert found.before.mean == pytest.approx(expected[:, 1].mean().item(), rel=1e-9)
    assert found.after.half == pytest.approx(1.96 * expected[:, 0].std().item() / math.sqrt(5))
    assert found.metric == ("accuracy" if dataset == "digits" else "mse")
    assert (found.tasks, found.not_finite, found.cut) == (5, 0, False)


@pytest.mark.parametrize("dataset", ["digits", "sinusoid"])
def test_the_tasks_do_not_depend_on_how_many_are_computed_at_a_time(dataset):
    found = [
        measured(*prepared(dataset=dataset, backbone="mlp-8"), 37, chunk=chunk)
        for chunk in (1, 5, 16, 64)
    ]
    for other in found[1:]:
        assert other.after == pytest.approx(found[0].after, rel=1e-9)
        assert other.before == pytest.approx(found[0].before, rel=1e-9)


def test_nothing_moves_and_modes_come_back():
    config, problem, built = prepared(backbone="strided-2x4", method="anil")
    built.features.train()
    before = {k: v.clone() for k, v in built.evaluate.state_dict().items()}
    random = torch.get_rng_state()
    measured(config, problem, built)
    assert same(dict(built.evaluate.state_dict()), before)
    assert all(m.training for m in built.features.modules())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.filterwarnings("ignore:fastkfo. tasks run one after the other")
def test_dropout_is_off():
    config, problem, built = prepared(method="anil")
    start = problem.tasks["test"].state_dict()
    without = measured(config, problem, built)
    built.features.append(torch.nn.Dropout(0.9))
    problem.tasks["test"].load_state_dict(start)
    assert measured(config, problem, built).after == without.after
    assert built.features[-1].training


def test_what_is_not_finite_is_wrong():
    config, problem, built = prepared(method="maml", fast_lr=1e200)
    found = measured(config, problem, built)
    assert found.not_finite == 5
    assert found.after.mean == 0
    assert found.before.mean > 0
    config, problem, built = prepared(
        method="maml", fast_lr=1e200, dataset="sinusoid", backbone="mlp-4"
    )
    found = measured(config, problem, built)
    assert not math.isfinite(found.after.mean)
    assert found.to_mapping()["after"] is None
    assert not found.better_than(None) or found.after.mean == math.inf


def test_it_can_be_stopped():
    asked = []
    config, problem, built = prepared()
    found = measured(config, problem, built, stop=lambda: len(asked) or asked.append(1))
    assert (found.tasks, found.cut) == (4, True)


def test_interval():
    found = interval(torch.tensor([0.0, 1.0, 0.5, 0.5]))
    assert found == Interval(0.5, pytest.approx(1.96 * (0.5 / 3) ** 0.5 / 2))
    assert math.isnan(interval(torch.ones(1)).half)


def test_better():
    def score(metric, mean):
        return Evaluation(metric, Interval(mean, 0.1), Interval(0, 0), 9, 2, 0, 1.0)

    assert score("accuracy", 0.5).better_than(0.4)
    assert not score("accuracy", 0.5).better_than(0.5)
    assert score("mse", 0.4).better_than(0.5)
    assert not score("mse", 0.6).better_than(0.5)
    assert score("mse", 9.0).better_than(None)
    assert not score("accuracy", math.nan).better_than(None)


def test_a_run_is_evaluated_as_it_was_tested(tmp_path):
    result = Trainer(small(tmp_path / "r", fast_lr=1.0)).run()
    found = evaluate(tmp_path / "r", tasks=4)
    assert (found.after, found.before) == (result.test.after, result.test.before)
    scores = {evaluate(tmp_path / "r", tasks=20, seed=seed).after for seed in range(3)}
    assert len(scores) > 1
    assert evaluate(tmp_path / "r", tasks=4, steps=5).steps == 5
    for options, message in (({"tasks": 1}, "tasks: expected at least 2"), ({"steps": 0}, "steps")):
        with pytest.raises(ValueError, match=message):
            evaluate(tmp_path / "r", **options)
