"""What `InnerLoop` promises beyond right numbers for right inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo import InnerLoop
from fastkfo.algorithms import MAML, MetaSGD

PATHS = [
    {},
    {"backend": "batched"},
    {"memory": "checkpoint"},
    {"memory": "adjoint"},
    {"chunk_size": 2},
    {"backend": "loop"},
]


@pytest.fixture
def batch():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    y = torch.arange(4).expand(3, 4) % 3
    return x[0], y, x[1], y


def linear():
    torch.manual_seed(1)
    return nn.Linear(5, 3).double()


class Own(MAML):
    """A learner that is known by its methods alone."""

    def forward(self, x):
        return super().forward(x)


class OwnAdapt(MAML):
    def adapt(self, loss, **options):
        super().adapt(2 * loss, **options)


@pytest.mark.parametrize("options", PATHS, ids=str)
def test_a_bad_task_adds_nothing_to_learned_step_weights(batch, options):
    x_s, y_s, x_q, y_q = batch
    bad = x_s.clone()
    bad[0, 1, 0] = torch.nan
    found = []
    for rows, x in ((slice(1, 3), x_s), (slice(0, 3), bad)):
        weights = nn.Parameter(torch.tensor([0.3, 0.7], dtype=torch.float64))
        inner_loop = InnerLoop(MAML(linear(), 0.1), F.cross_entropy, 2, **options)
        out = inner_loop(x[rows], y_s[rows], x_q[rows], y_q[rows], step_weights=weights)
        out.loss[out.finite].sum().backward()
        found.append(weights.grad)
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.filterwarnings("ignore:fastkfo. tasks run one after the other")
def test_a_bad_loss_of_a_learner_of_its_own_adds_nothing(batch):
    x_s, y_s, x_q, y_q = batch
    bad = x_s.clone()
    bad[1] = torch.nan
    learner = Own(linear(), 0.1)
    out = InnerLoop(learner, F.cross_entropy, 2)(bad, y_s, x_q, y_q)
    out.loss[out.finite].sum().backward()
    assert out.finite.tolist() == [True, False, True]
    assert learner.module.weight.grad.isfinite().all()


def test_step_weights_in_a_list_are_learned(batch):
    weights = nn.Parameter(torch.tensor([0.3, 0.7], dtype=torch.float64))
    inner_loop = InnerLoop(MAML(linear(), 0.1), F.cross_entropy, 2)
    inner_loop(*batch, step_weights=list(weights)).loss.sum().backward()
    (given,) = torch.autograd.grad(inner_loop(*batch, step_weights=weights).loss.sum(), [weights])
    torch.testing.assert_close(weights.grad, given)


def test_an_option_that_a_clone_does_not_take_is_named(batch):
    class OwnRates(MetaSGD):
        def forward(self, x):
            return super().forward(x)

    inner_loop = InnerLoop(OwnRates(linear(), 0.1), F.cross_entropy, 2, first_order=True)
    with pytest.raises(ValueError, match=r"first_order: expected None, as OwnRates\.clone"):
        inner_loop(*batch)


def test_a_learner_with_an_adapt_of_its_own_is_not_batched_silently(batch):
    learner = OwnAdapt(linear(), 0.1)
    with pytest.raises(ValueError, match=r"learner: .*'adapt' of its own"):
        InnerLoop(learner, F.cross_entropy, 2).adapt(*batch[:2])
    with pytest.raises(ValueError, match=r"tasks: .*'adapt' of its own"):
        learner.clone(tasks=3)


@pytest.mark.parametrize("kind", [MAML, Own])
def test_an_error_leaves_buffers_as_they_were(batch, kind):
    x_s, y_s, x_q, y_q = batch
    wrong = y_q.clone()
    wrong[2, 0] = 9
    norm = nn.BatchNorm1d(5).double()
    inner_loop = InnerLoop(kind(nn.Sequential(norm, linear()), 0.1), F.cross_entropy, 1)
    with pytest.raises((ValueError, IndexError)):
        inner_loop(x_s, y_s, x_q, wrong)
    assert norm.num_batches_tracked == 0
    assert norm.running_mean.eq(0).all()


def test_a_loss_without_parameters_is_part_of_the_module():
    class Noisy(nn.Module):
        def forward(self, predictions, targets):
            return F.cross_entropy(F.dropout(predictions, 0.9, self.training), targets)

    loss = Noisy()
    InnerLoop(MAML(linear(), 0.1), loss, 1).eval()
    assert not loss.training
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3))
    inner_loop = InnerLoop(MAML(linear(), 0.1), F.cross_entropy, 1, query_loss=weighted).double()
    assert weighted.weight.dtype == torch.float64
    assert any(key.endswith("weight") for key in inner_loop.state_dict() if "loss" in key)


@pytest.mark.parametrize("options", PATHS, ids=str)
@pytest.mark.parametrize(("place", "name"), [(1, "y_s"), (3, "y_q")])
def test_labels_out_of_range_name_their_argument(batch, options, place, name):
    given = list(batch)
    given[place] = given[place].clone()
    given[place][1, 2] = 7
    with pytest.raises(ValueError, match=f"{name}: expected labels from 0 to 2, got 7"):
        InnerLoop(MAML(linear(), 0.1), F.cross_entropy, 2, **options)(*given)


def test_missing_and_mixed_inputs_are_named(batch):
    x_s, y_s, x_q, y_q = batch
    inner_loop = InnerLoop(MAML(linear(), 0.1), F.cross_entropy, 2)
    with pytest.raises(TypeError, match="y_s: expected support targets"):
        inner_loop(x_s, None, x_q, y_q)
    with pytest.raises(TypeError, match="y_s: expected support targets"):
        inner_loop.adapt(x_s, None)
    with pytest.raises(TypeError, match="y_s: expected no list where x_s is a Tensor"):
        inner_loop(x_s, list(y_s), x_q, y_q)
    with pytest.raises(TypeError, match=r"x_s: expected a tensor .* for task 1, got NoneType"):
        inner_loop([x_s[0], None], list(y_s[:2]), list(x_q[:2]), list(y_q[:2]))


def test_a_query_loss_of_the_wrong_shape_is_named(batch):
    def each(predictions, targets):
        return F.cross_entropy(predictions, targets, reduction="none")

    with pytest.raises(ValueError, match="query_loss: expected one number per task"):
        InnerLoop(MAML(linear(), 0.1), F.cross_entropy, 2, query_loss=each)(*batch)


def test_a_batched_learner_has_its_models_attributes():
    model = linear()
    model.note = "mine"
    assert MAML(model, 0.1).clone(tasks=2).note == "mine"
    assert fastkfo.algorithms.MAML(model, 0.1).clone(tasks=2).weight.shape == (2, 3, 5)
