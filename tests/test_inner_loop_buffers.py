"""Running statistics after whole meta-batches are those that learn2learn's loop leaves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from tests.models import CLASSES, LR, assert_close, perturb
from tests.oracle import learn2learn

pytestmark = pytest.mark.slow

NORMS = {
    "default": {},
    "momentum-0.7": {"momentum": 0.7},
    "cumulative": {"momentum": None},
    "cumulative-plain": {"momentum": None, "affine": False},
    "untracked": {"track_running_stats": False},
    "plain": {"affine": False},
}
TASKS = 5
PATHS = {
    f"{backend}-{memory}-{size or 'all'}": {
        "backend": backend,
        "memory": memory,
        "chunk_size": size,
    }
    for backend in ("batched", "loop")
    for memory in ("full", "checkpoint", "adjoint")
    for size in (None, 1, 2, TASKS)
}
SOME = ("batched-full-all", "batched-full-1", "batched-adjoint-2", "batched-checkpoint-all",
        "loop-full-all")  # fmt: skip
SOME_PATHS = {name: PATHS[name] for name in SOME}
every_norm = pytest.mark.parametrize("options", NORMS.values(), ids=NORMS)
some_norms = pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=["0.1", "cumulative"])
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
some_paths = pytest.mark.parametrize("path", SOME_PATHS.values(), ids=SOME_PATHS)
sizes = pytest.mark.parametrize("steps", [0, 1, 3], ids="K{}".format)
counts = pytest.mark.parametrize("tasks", [1, TASKS], ids="T{}".format)
dims = pytest.mark.parametrize("dim", [1, 2], ids=["1d", "2d"])
SHAPES = {1: (4,), 2: (2, 5, 5)}


def model(dim=1, **options):
    torch.manual_seed(0)
    if dim == 1:
        layers = [
            nn.Linear(4, 6), nn.BatchNorm1d(6, **options), nn.Tanh(),
            nn.Linear(6, 5), nn.BatchNorm1d(5, **options), nn.Tanh(), nn.Linear(5, CLASSES),
        ]  # fmt: skip
    else:
        layers = [
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, **options), nn.Tanh(),
            nn.Flatten(), nn.Linear(27, CLASSES),
        ]  # fmt: skip
    made = perturb(nn.Sequential(*layers).double())
    for (
        name,
        buffer,
    ) in made.named_buffers():  # neither 0 nor 1, so that what they begin with counts
        buffer.fill_(4) if "num_batches" in name else buffer.uniform_(0.5, 1.5)
    return made


def learner(lib, dim=1, kind="MAML", **options):
    made = model(dim, **options)
    if kind != "GBML":
        return getattr(lib.algorithms, kind)(made, lr=LR)
    kron = lib.optim.KroneckerTransform(lib.nn.KroneckerLinear)
    return perturb(lib.algorithms.GBML(made, transform=kron, lr=LR).double())


def task(shape, support=6, query=5):
    x = torch.randn(support + query, *shape, dtype=torch.float64) * 2 + 1
    y = torch.randint(CLASSES, (support + query,))
    return x[:support], y[:support], x[support:], y[support:]


def meta_batch(dim=1, tasks=TASKS, seed=1):
    """T tasks, one by one, each with statistics of its own."""
    torch.manual_seed(seed)
    return [tuple(x * (t + 1) if x.is_floating_point() else x for x in task(SHAPES[dim]))
            for t in range(tasks)]  # fmt: skip


def stacked(rows):
    return [torch.stack(x) for x in zip(*rows, strict=True)]


def run_task(clone, steps, x_s, y_s, x_q, y_q):
    for _ in range(steps):
        clone.adapt(F.cross_entropy(clone(x_s), y_s))
    return F.cross_entropy(clone(x_q), y_q)


def loop_over(learner, rows, steps):
    """learn2learn's loop."""
    return torch.stack([run_task(learner.clone(), steps, *row) for row in rows])


def by_clone(learner, rows, steps, **options):
    loss = fastkfo.per_task(F.cross_entropy)
    clone = learner.clone(tasks=len(rows), **options)
    x_s, y_s, x_q, y_q = stacked(rows)
    for _ in range(steps):
        clone.adapt(loss(clone(x_s), y_s))
    return loss(clone(x_q), y_q), clone


def inner_loop(learner, steps, **options):
    return fastkfo.InnerLoop(learner, F.cross_entropy, steps, **options)


def state(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_buffers(found, want):
    found, want = (x if isinstance(x, dict) else state(x) for x in (found, want))
    assert found.keys() == want.keys()
    for name, buffer in found.items():
        assert buffer.dtype == want[name].dtype, name
        if buffer.is_floating_point():
            assert_close(buffer, want[name], floor=1e-12, tol=1e-12, what=name)
        else:
            assert buffer.tolist() == want[name].tolist(), name


def assert_moved(module, before):
    for name, buffer in module.named_buffers():
        assert not torch.equal(buffer, before[name]), name


def pair(dim=1, kind="MAML", **options):
    """Ours and learn2learn's, and how their buffers are before."""
    ours, theirs = (learner(lib, dim, kind, **options) for lib in (fastkfo, learn2learn()))
    return ours, theirs, state(ours)


@dims
@every_norm
@counts
@sizes
def test_of_a_batched_learner(steps, tasks, options, dim):
    ours, theirs, before = pair(dim, **options)
    rows = meta_batch(dim, tasks)
    losses, _ = by_clone(ours, rows, steps)
    want = loop_over(theirs, rows, steps)
    assert_close(losses.detach(), want.detach())
    assert_buffers(ours, theirs)
    assert_moved(ours, before)
    losses.sum().backward()
    assert_buffers(ours, theirs)


@pytest.mark.parametrize("kind", ["GBML", "MetaSGD"])
@dims
def test_of_other_learners(dim, kind):
    ours, theirs, before = pair(dim, kind)
    for rows in (meta_batch(dim, seed=1), meta_batch(dim, seed=2)):
        by_clone(ours, rows, 2)
        loop_over(theirs, rows, 2)
        assert_buffers(ours, theirs)
    assert_moved(ours, before)


def dealt():
    """Two norms for each path: each backend in each memory mode has all of them."""
    for p, path in enumerate(PATHS):
        for n in (p, p + len(NORMS) // 2):
            yield path, list(NORMS)[n % len(NORMS)]


@pytest.mark.parametrize(("path", "norm"), list(dealt()))
def test_of_an_inner_loop(path, norm):
    ours, theirs, before = pair(2, "GBML", **NORMS[norm])
    rows = meta_batch(2)
    loss_of = inner_loop(ours, 3, **PATHS[path])(*stacked(rows)).loss
    loop_over(theirs, rows, 3)
    assert_buffers(ours, theirs)
    assert_moved(ours, before)
    loss_of.sum().backward(retain_graph=True)
    assert_buffers(ours, theirs)  # what is computed again does not count again
    loss_of.sum().backward()
    assert_buffers(ours, theirs)


@some_paths
@some_norms
@counts
@sizes
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_every_size(grad, steps, tasks, options, path):
    ours, theirs, before = pair(**options)
    rows = meta_batch(tasks=tasks)
    with torch.set_grad_enabled(grad):
        out = inner_loop(ours, steps, **path)(*stacked(rows))
    loop_over(theirs, rows, steps)
    assert_buffers(ours, theirs)
    assert_moved(ours, before)
    if grad:
        out.loss.sum().backward()
        assert_buffers(ours, theirs)


@some_paths
@some_norms
def test_a_query_after_every_step(options, path):
    ours, theirs, _ = pair(**options)
    rows = meta_batch()
    inner_loop(ours, 2, **path)(*stacked(rows), step_weights=[1.0, 1.0]).loss.sum().backward()
    for x_s, y_s, x_q, _ in rows:
        clone = theirs.clone()
        for _ in range(2):
            clone.adapt(F.cross_entropy(clone(x_s), y_s))
            clone(x_q)
    assert_buffers(ours, theirs)


@every_path
@some_norms
def test_tasks_of_unequal_shapes_count_in_their_order(options, path):
    torch.manual_seed(2)
    sizes = [(6, 5), (3, 4), (6, 5), (2, 5), (3, 4)]
    rows = [task(SHAPES[1], *size) for size in sizes]
    ours, theirs, _ = pair(**options)
    out = inner_loop(ours, 2, **path)(*[list(x) for x in zip(*rows, strict=True)])
    want = loop_over(theirs, rows, 2)
    assert_close(out.loss.detach(), want.detach())
    assert_buffers(ours, theirs)
    out.loss.sum().backward()
    assert_buffers(ours, theirs)
    if options == {}:
        other = learner(learn2learn(), **options)
        loop_over(other, rows[::-1], 2)
        assert any(
            (a - b).abs().max() > 1e-3 for a, b in zip(ours.buffers(), other.buffers(), strict=True)
        )


def anil(lib, **options):
    torch.manual_seed(4)
    body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, **options), nn.Tanh()).double()
    head = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, **options), nn.Linear(4, CLASSES))
    return lib.algorithms.MAML(head.double(), lr=LR), body


@some_paths
@every_norm
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_features_see_support_and_query_together(ragged, options, path):
    (theirs, their_body), (ours, body) = anil(learn2learn(), **options), anil(fastkfo, **options)
    rows = meta_batch()
    if ragged:
        rows = [row if t % 2 else task(SHAPES[1], 4, 3) for t, row in enumerate(rows)]
    for x_s, y_s, x_q, y_q in rows:
        seen = their_body(torch.cat([x_s, x_q]))
        run_task(theirs.clone(), 2, seen[: len(x_s)], y_s, seen[len(x_s) :], y_q)
    loop = inner_loop(ours, 2, features=body, **path)
    data = [list(x) for x in zip(*rows, strict=True)] if ragged else stacked(rows)
    loss = loop(*data).loss
    for _ in range(2):
        assert_buffers(ours, theirs)
        assert_buffers(body, their_body)
        loss.sum().backward(retain_graph=True)
    assert_buffers(ours, theirs)
    assert_buffers(body, their_body)


@some_paths
@every_norm
def test_two_calls_in_a_row(options, path):
    ours, theirs, _ = pair(**options)
    loop = inner_loop(ours, 2, **path)
    first, second = meta_batch(seed=1), meta_batch(seed=2)
    losses = [loop(*stacked(rows)).loss.sum() for rows in (first, second)]
    for rows in (first, second):
        loop_over(theirs, rows, 2)
    assert_buffers(ours, theirs)
    sum(losses).backward()
    assert_buffers(ours, theirs)


@every_norm
def test_interleaved_clones(options):
    """Pass by pass in the order in which they are called, as learn2learn's clones would be."""
    ours, theirs, _ = pair(**options)
    loss = fastkfo.per_task(F.cross_entropy)
    all_rows = meta_batch(seed=1), meta_batch(seed=2)
    clones = [ours.clone(tasks=TASKS) for _ in range(2)]
    other = [[theirs.clone() for _ in range(TASKS)] for _ in range(2)]
    for _ in range(3):
        for clone, own, rows in zip(clones, other, all_rows, strict=True):
            x_s, y_s, _, _ = stacked(rows)
            clone.adapt(loss(clone(x_s), y_s))
            for each, (x, y, _, _) in zip(own, rows, strict=True):
                each.adapt(F.cross_entropy(each(x), y))
    assert_buffers(ours, theirs)


@every_norm
def test_somebody_else_changes_a_statistic(options):
    ours, theirs, _ = pair(**options)
    rows = meta_batch()
    clone, others = ours.clone(tasks=TASKS), [theirs.clone() for _ in range(TASKS)]
    for reset in (False, True):
        if reset:
            for learner in (ours, theirs):
                for name, buffer in learner.named_buffers():
                    if "running" in name:
                        buffer.fill_(3.0)
        clone(stacked(rows)[0])
        for each, (x, _, _, _) in zip(others, rows, strict=True):
            each(x)
    assert_buffers(ours, theirs)
