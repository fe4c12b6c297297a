"""Running statistics in eval mode, frozen and per task; what a NaN leaves of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from tests.models import CLASSES, LR, assert_close
from tests.oracle import learn2learn
from tests.test_inner_loop_buffers import (
    SOME_PATHS,
    TASKS,
    assert_buffers,
    assert_moved,
    by_clone,
    dims,
    every_norm,
    inner_loop,
    learner,
    loop_over,
    meta_batch,
    pair,
    some_norms,
    some_paths,
    stacked,
    state,
)

pytestmark = pytest.mark.slow


@some_paths
@every_norm
@dims
def test_eval_mode_reads_and_moves_nothing(dim, options, path):
    ours, theirs, before = pair(dim, **options)
    ours.eval(), theirs.eval()
    rows = meta_batch(dim)
    want = loop_over(theirs, rows, 2).detach()
    assert_close(by_clone(ours, rows, 2)[0].detach(), want)
    out = inner_loop(ours, 2, **path).eval()(*stacked(rows))
    assert_close(out.loss.detach(), want)
    out.loss.sum().backward()
    assert_buffers(ours, before)


@some_paths
def test_one_norm_in_eval_mode(path):
    ours, theirs, before = pair()
    ours.module[1].eval(), theirs.module[1].eval()
    rows = meta_batch()
    assert_close(inner_loop(ours, 2, **path)(*stacked(rows)).loss, loop_over(theirs, rows, 2))
    assert_buffers(ours, theirs)
    assert_buffers(ours.module[1], theirs.module[1])
    assert torch.equal(ours.module[1].running_mean, before["module.1.running_mean"])
    assert not torch.equal(ours.module[4].running_mean, before["module.4.running_mean"])


@some_norms
def test_eval_reads_the_statistics_of_the_clone(options):
    """Those of all tasks' passes would be no task's own."""
    ours, frozen = learner(fastkfo, **options), learner(fastkfo, **options)
    x = stacked(meta_batch())[0]
    clone = ours.clone(tasks=TASKS)
    clone(x)
    assert_moved(ours, state(frozen))
    clone.eval()
    want = torch.stack([frozen.eval()(row) for row in x])
    assert_close(clone(x).detach(), want.detach())
    later = ours.clone(tasks=TASKS).eval()  # a later clone begins with what has come of it
    assert_close(later(x).detach(), torch.stack([ours.eval()(row) for row in x]).detach())


@some_paths
@every_norm
@pytest.mark.parametrize("mode", ["frozen", "per_task"])
def test_frozen_and_per_task_leave_the_parent_alone(mode, options, path):
    ours, theirs, before = pair(**options)
    rows = meta_batch()
    want = loop_over(theirs, rows, 3).detach()  # in train mode nothing reads the statistics
    assert_close(by_clone(ours, rows, 3, buffers=mode)[0].detach(), want)
    loss = inner_loop(ours, 3, buffers=mode, **path)(*stacked(rows)).loss
    assert_close(loss.detach(), want)
    loss.sum().backward()
    assert_buffers(ours, before)


def own_loops(theirs, rows, steps, query=True):
    """Every task's clone of learn2learn, with buffers of its own."""
    found = []
    for x_s, y_s, x_q, _ in rows:
        clone = copy.deepcopy(theirs).clone()
        for _ in range(steps):
            clone.adapt(F.cross_entropy(clone(x_s), y_s))
        if query:
            clone(x_q)
        found.append(clone)
    return found


@dims
@every_norm
def test_every_task_has_its_own(options, dim):
    ours, theirs, _ = pair(dim, **options)
    rows = meta_batch(dim)
    x_q = stacked(rows)[2]
    _, clone = by_clone(ours, rows, 3, buffers="per_task")
    want = own_loops(theirs, rows, 3)
    for t in range(TASKS):
        assert_buffers(clone.task(t), want[t].module)
        assert_buffers(clone.task(t - TASKS), want[t].module)
    clone.module.eval()
    each = torch.stack([w.eval()(x) for w, x in zip(want, x_q, strict=True)])
    assert_close(clone(x_q).detach(), each.detach())
    alone = torch.stack([clone.task(t)(x) for t, x in enumerate(x_q)])
    assert_close(alone.detach(), each.detach())


@pytest.mark.parametrize("mode", ["shared", "frozen"])
def test_a_task_has_no_statistics_of_its_own(mode):
    ours = learner(fastkfo)
    before = state(ours)
    _, clone = by_clone(ours, meta_batch(), 2, buffers=mode)
    for t in range(TASKS):
        for name, buffer in clone.task(t).named_buffers():
            if "running" in name:
                assert_close(buffer, before[f"module.{name}"], tol=1e-12, what=name)


@some_norms
def test_adapt_of_an_inner_loop_has_them_too(options):
    ours, theirs, before = pair(**options)
    rows = meta_batch()
    x_s, y_s, x_q, _ = stacked(rows)
    adapted = inner_loop(ours, 2, buffers="per_task").adapt(x_s, y_s)
    want = own_loops(theirs, rows, 2, query=False)
    for t in range(TASKS):
        assert_buffers(adapted.task(t), want[t].module)
    adapted.eval()
    each = torch.stack([w.eval()(x) for w, x in zip(want, x_q, strict=True)])
    assert_close(adapted(x_q).detach(), each.detach())
    assert_buffers(ours, before)


@some_norms
def test_adapt_of_an_inner_loop_moves_what_is_shared(options):
    ours, theirs, _ = pair(**options)
    rows = meta_batch()
    x_s, y_s, _, _ = stacked(rows)
    inner_loop(ours, 2).adapt(x_s, y_s)
    for x, y, _, _ in rows:
        clone = theirs.clone()
        for _ in range(2):
            clone.adapt(F.cross_entropy(clone(x), y))
    assert_buffers(ours, theirs)


def spoiled(rows, task, where):
    rows = [list(row) for row in rows]
    rows[task][where] = rows[task][where].clone()
    rows[task][where][1, 0] = float("nan")
    return rows


def running(module):
    return {n: b for n, b in state(module).items() if "num_batches" not in n}


@pytest.mark.parametrize("path", [None, *SOME_PATHS.values()], ids=["clone", *SOME_PATHS])
@some_norms
@pytest.mark.parametrize("bad", [0, 2, TASKS - 1], ids="task{}".format)
def test_a_nan_does_not_reach_the_statistics(bad, options, path):
    """The other tasks fold as if the bad one were not there."""
    ours, theirs, before = pair(**options)
    rows = meta_batch()
    data = spoiled(rows, bad, 0)
    if path is None:
        losses, _ = by_clone(ours, data, 2)
    else:
        losses = inner_loop(ours, 2, **path)(*stacked(data)).loss
    assert [bool(x.isnan()) for x in losses] == [t == bad for t in range(TASKS)]
    loop_over(theirs, [row for t, row in enumerate(rows) if t != bad], 2)
    assert_buffers(running(ours), running(theirs))
    assert_moved(ours, before)


@some_paths
def test_a_nan_in_a_query_leaves_what_the_support_has_done(path):
    ours, theirs, _ = pair()
    rows = meta_batch()
    inner_loop(ours, 2, **path)(*stacked(spoiled(rows, 2, 2)))
    for t, (x_s, y_s, x_q, _) in enumerate(rows):
        clone = theirs.clone()
        for _ in range(2):
            clone.adapt(F.cross_entropy(clone(x_s), y_s))
        if t != 2:
            clone(x_q)
    assert_buffers(running(ours), running(theirs))


@some_norms
def test_a_call_after_a_nan(options):
    ours, theirs, _ = pair(**options)
    rows = meta_batch()
    inner_loop(ours, 2)(*stacked(spoiled(rows, 2, 0)))
    loop_over(theirs, [row for t, row in enumerate(rows) if t != 2], 2)
    inner_loop(ours, 2)(*stacked(rows))
    loop_over(theirs, rows, 2)
    assert_buffers(running(ours), running(theirs))


class Twice(nn.Module):
    """One norm that is called twice in a pass, under one name or two."""

    def __init__(self, names, options):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.norm = nn.BatchNorm1d(4, **options)
        if names == 2:
            self.same = self.norm
        self.names = names

    def forward(self, x):
        h = torch.tanh(self.norm(self.first(x)))
        return self.head(self.norm(h) if self.names == 1 else self.same(h))


@some_paths
@some_norms
@pytest.mark.parametrize("names", [1, 2], ids=["one-name", "two-names"])
def test_a_norm_that_is_called_twice(names, options, path):
    def made(lib):
        torch.manual_seed(0)
        return lib.algorithms.MAML(Twice(names, options).double(), lr=LR)

    ours, theirs = made(fastkfo), made(learn2learn())
    rows = meta_batch()
    inner_loop(ours, 2, **path)(*stacked(rows)).loss.sum().backward()
    loop_over(theirs, rows, 2)
    assert_buffers(ours, theirs)
