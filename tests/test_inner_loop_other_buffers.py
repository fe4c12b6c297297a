"""Models that change other buffers than batch norms' go task after task; what exceptions leave."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fastkfo
from tests.models import CLASSES, LR, assert_close
from tests.oracle import learn2learn
from tests.test_inner_loop_buffer_modes import own_loops
from tests.test_inner_loop_buffers import (
    TASKS,
    assert_buffers,
    by_clone,
    inner_loop,
    loop_over,
    meta_batch,
    run_task,
    some_norms,
    stacked,
    state,
)

pytestmark = pytest.mark.slow

INPLACE, REBOUND = "in-place", "rebound"


class Watching(nn.Module):
    """A linear layer that keeps count, and a moving average of its inputs, which scales them."""

    def __init__(self, how):
        super().__init__()
        self.how, self.linear = how, nn.Linear(4, 6)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x):
        mean = x.detach().mean(0)
        if self.how == INPLACE:
            self.seen += 1
            self.average.mul_(0.7).add_(0.3 * mean)
        else:
            self.average = 0.7 * self.average + 0.3 * mean
        return self.linear(x / (1 + self.average.abs()))


def watching(how):
    torch.manual_seed(0)
    if how == "spectral":
        return parametrizations.spectral_norm(nn.Linear(4, 6))
    return Watching(how) if how in (INPLACE, REBOUND) else nn.Linear(4, 6)


def others(how, *, norm=True):
    """Ours and learn2learn's learner of a model with such a layer."""

    def made(lib):
        layers = [watching(how), nn.BatchNorm1d(6)][: 2 if norm else 1]
        model = nn.Sequential(*layers, nn.Tanh(), nn.Linear(6, CLASSES)).double()
        return lib.algorithms.MAML(model, lr=LR)

    return made(fastkfo), made(learn2learn())


NAMED = {INPLACE: "'0'", REBOUND: "'0.average'", "spectral": "'0.parametrizations.weight.0'"}
HOW = list(NAMED)
LOOPS = {
    "full": {},
    "checkpoint": {"memory": "checkpoint"},
    "adjoint": {"memory": "adjoint"},
    "chunks": {"chunk_size": 2},
    "chunks-adjoint": {"chunk_size": 1, "memory": "adjoint"},
    "loop": {"backend": "loop"},
}
every_loop = pytest.mark.parametrize("path", LOOPS.values(), ids=LOOPS)
kinds = pytest.mark.parametrize("how", HOW)


def _case(how, name, tasks):
    return pytest.param(how, LOOPS[name], tasks, id=f"{how}-{name}-T{tasks}")


CASES = [_case(how, name, tasks) for how in HOW for name in LOOPS for tasks in (1, TASKS)]


@pytest.mark.parametrize(("how", "path", "tasks"), CASES)
def test_a_module_that_changes_other_buffers(how, path, tasks):
    """It goes task after task, with one warning, and is where learn2learn's loop leaves it."""
    ours, theirs = others(how)
    loop = inner_loop(ours, 2, **path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in (1, 2):
            rows = meta_batch(tasks=tasks, seed=seed)
            out = loop(*stacked(rows))
            want = loop_over(theirs, rows, 2)
            assert_close(out.loss.detach(), want.detach())
            assert_buffers(ours, theirs)
            out.loss.sum().backward()
            want.sum().backward()
            assert_buffers(ours, theirs)
    assert_warned_once(caught, how, 0 if "backend" in path else 1)
    total = sum(q.grad.square().sum() for q in theirs.parameters()).sqrt().item()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(p.grad, q.grad, floor=1e-4 * total)


def assert_warned_once(caught, how, times=1):
    said = [str(w.message) for w in caught if "fastkfo" in str(w.message)]
    assert len(said) == times, said
    assert all(NAMED[how] in text for text in said), said


@kinds
@every_loop
@pytest.mark.parametrize("mode", ["frozen", "per_task"])
@pytest.mark.filterwarnings("ignore:fastkfo")
def test_other_buffers_that_shall_not_move(mode, path, how):
    ours, theirs = others(how)
    before, rows = state(ours), meta_batch()
    want = torch.stack([run_task(copy.deepcopy(theirs).clone(), 2, *row) for row in rows])
    loss = inner_loop(ours, 2, buffers=mode, **path)(*stacked(rows)).loss
    if mode == "per_task":
        assert_close(loss.detach(), want.detach())
    loss.sum().backward()
    assert_buffers(ours, before)


@pytest.mark.parametrize(
    ("how", "mode"),
    [
        (INPLACE, "shared"),
        ("spectral", "shared"),
        (REBOUND, "shared"),
        (INPLACE, "per_task"),
        ("spectral", "per_task"),
        (REBOUND, "per_task"),
    ],
)
def test_other_buffers_by_a_batched_learner(how, mode):
    """Pass by pass: learn2learn's clones, called in that order."""
    ours, theirs = others(how, norm=False)
    rows = meta_batch()
    x_s, y_s, x_q, _ = stacked(rows)
    loss, clone = fastkfo.per_task(F.cross_entropy), ours.clone(tasks=TASKS, buffers=mode)
    parent = copy.deepcopy if mode == "per_task" else lambda x: x
    each = [parent(theirs).clone() for _ in rows]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            clone.adapt(loss(clone(x_s), y_s))
            for own, row in zip(each, rows, strict=True):
                own.adapt(F.cross_entropy(own(row[0]), row[1]))
        found = clone(x_q)
    want = torch.stack([own(row[2]) for own, row in zip(each, rows, strict=True)])
    assert_warned_once(caught, how)
    assert_close(found.detach(), want.detach())
    assert_buffers(ours, theirs)


class Counting(nn.Linear):
    """Changes a buffer that its result does not depend on."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return super().forward(x)


@some_norms
def test_own_statistics_of_a_model_that_goes_task_after_task(options):
    def made(lib):
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(6, **options)
        model = nn.Sequential(Counting(4, 6), norm, nn.Linear(6, CLASSES)).double()
        return lib.algorithms.MAML(model, lr=LR)

    rows = meta_batch()
    with pytest.warns(UserWarning, match="task after task"):
        _, clone = by_clone(made(fastkfo), rows, 2, buffers="per_task")
    for t, want in enumerate(own_loops(made(learn2learn()), rows, 2)):
        assert_buffers(clone.task(t).get_submodule("1"), want.module[1])


class Failing(nn.Module):
    """Raises from the n-th pass on."""

    def __init__(self, first, passes):
        super().__init__()
        self.first, self.passes, self.count = first, passes, [0]
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, CLASSES)

    def forward(self, x):
        h = self.norm(self.first(x))
        self.count[0] += 1
        if self.count[0] >= self.passes:
            raise ArithmeticError("boom")
        return self.head(h)


firsts = pytest.mark.parametrize("first", ["linear", INPLACE, REBOUND, "spectral"])


@every_loop
@firsts
@pytest.mark.filterwarnings("ignore:fastkfo")
def test_an_exception_at_the_second_step_leaves_buffers_alone(first, path):
    _check_exception(first, 2, path)


@every_loop
@pytest.mark.parametrize(
    "first",
    [
        "linear",
        REBOUND,
        INPLACE,
        "spectral",
    ],
)
def test_an_exception_in_the_third_task_leaves_buffers_alone(first, path):
    _check_exception(first, 8, path | {"backend": "loop"})


def _check_exception(first, passes, path):
    model = Failing(watching(first), passes).double()
    ours = fastkfo.algorithms.MAML(model, lr=LR)
    before = state(ours)
    loop = inner_loop(ours, 2, **path)
    with pytest.raises(ArithmeticError, match="boom"):
        loop(*stacked(meta_batch()))
    assert_buffers(ours, before)
    model.passes = float("inf")  # nothing is left over for the next call either
    loop(*stacked(meta_batch()))
    assert ours.module.norm.num_batches_tracked == 3 * TASKS


@firsts
@pytest.mark.filterwarnings("ignore:fastkfo")
def test_an_exception_in_a_batched_learner(first):
    """The pass that fails leaves no trace; those before it stay."""
    x = stacked(meta_batch())[0]
    model = Failing(watching(first), float("inf")).double()
    clone = fastkfo.algorithms.MAML(model, lr=LR).clone(tasks=TASKS)
    clone(x)
    before = state(model)
    clone.module.passes = 0
    with pytest.raises(ArithmeticError, match="boom"):
        clone(x)
    assert_buffers(model, before)
    clone.module.passes = float("inf")
    clone(x)
    assert model.norm.num_batches_tracked == 2 * TASKS
