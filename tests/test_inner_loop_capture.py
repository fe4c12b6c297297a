"""Recorded inner loops: when they are recorded, and that replays are the calls they stand for.

The graphs are a stand-in that runs on a CPU; tests/test_inner_loop_gpu.py has CUDA's.
"""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.inner_loop import recorder
from fastkfo.inner_loop.captured import Captured
from tests.graphs_on_cpu import Graph
from tests.models import assert_close

CALLS = recorder.EAGER_CALLS + 1


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(recorder, "DEVICE", "cpu")
    Graph.made = 0


def recorded(loop):
    loop.recorder = recorder.Recorder(Graph)
    Graph.buffers = list(loop.buffers())
    return loop


def batch(seed, tasks=3, size=(8,), needs=False):
    g = torch.Generator().manual_seed(seed)
    x_s, x_q = (torch.randn(tasks, 10, *size, generator=g).double() for _ in range(2))
    y_s, y_q = (torch.randint(5, (tasks, 10), generator=g) for _ in range(2))
    return x_s.requires_grad_(needs), y_s, x_q, y_q


def learner(name="mlp", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))
    if name == "norm":
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
        )
    update = fastkfo.optim.KroneckerTransform(fastkfo.nn.KroneckerLinear)
    return fastkfo.algorithms.GBML(model.double(), update, lr=0.1, **options).double()


def pair(**options):
    """The same inner loop twice: as it is, and recorded."""
    name = options.pop("name", "mlp")
    plain = learner(name, allow_nograd=True)
    other = copy.deepcopy(plain)
    given = {"backend": "batched", **options}
    return (
        fastkfo.InnerLoop(plain, F.cross_entropy, 2, **(given | {"capture": False})),
        recorded(fastkfo.InnerLoop(other, F.cross_entropy, 2, **given)),
    )


def gradients(loop, data, weight=1.0, **options):
    loop.zero_grad()
    out = loop(*data, **options)
    if loop.capture is not False and Graph.made:
        assert loop.recorder.why_not is None
    (weight * out.loss).sum().backward()
    grads = [p.grad.clone() for p in loop.parameters()]
    if data[0].requires_grad:
        grads.append(data[0].grad.clone())
        data[0].grad = None
    return out, grads


def same(a, b):
    flat = [[out.loss, out.predictions, out.support_loss, *grads] for out, grads in (a, b)]
    for x, y in zip(*flat, strict=True):
        assert_close(x.detach(), y.detach(), tol=1e-12)
    assert torch.equal(a[0].finite, b[0].finite)


@pytest.mark.parametrize("backend", ["batched", "auto"])
@pytest.mark.parametrize("needs", [False, True], ids=["data", "data with gradients"])
def test_replays_equal_calls(backend, needs):
    plain, loop = pair(backend=backend)
    for k in range(CALLS + 3):
        data = batch(k, needs=needs)
        weight = torch.tensor([1.0, 2.0, -0.5]) * (k + 1)
        same(gradients(plain, data, weight), gradients(loop, data, weight))
        assert Graph.made == (0 if k + 1 < CALLS else 2)


def test_results_outlive_the_next_replay():
    plain, loop = pair()
    for k in range(CALLS):
        gradients(loop, batch(k))
    first = gradients(loop, batch(10))
    gradients(loop, batch(11))
    same(gradients(plain, batch(10)), first)


def test_gradients_in_any_order():
    plain, loop = pair(name="norm")
    data = [batch(k, size=(1, 8, 8)) for k in range(6)]
    for k in range(CALLS):
        gradients(plain, data[k])
        gradients(loop, data[k])
    found = []
    for each in (plain, loop):
        each.zero_grad()
        losses = [each(*x).loss for x in data[3:]]
        for k in (1, 0, 2):
            (losses[k] * (k + 1)).sum().backward()
        found.append([p.grad for p in each.parameters()] + [x.double() for x in each.buffers()])
    for a, b in zip(*found, strict=True):
        assert_close(b, a, tol=1e-12)


def test_a_graph_of_the_gradient_is_not_recorded():
    plain, loop = pair()
    for k in range(CALLS):
        gradients(loop, batch(k))
    found = []
    for each in (plain, loop):
        params = list(each.parameters())
        once = torch.autograd.grad(each(*batch(7)).loss.sum(), params, create_graph=True)
        twice = torch.autograd.grad(sum([x.square().sum() for x in once]), params)
        found.append([*once, *twice])
    for a, b in zip(*found, strict=True):
        assert_close(b.detach(), a.detach(), tol=1e-10)


def test_batch_norms_statistics():
    plain, loop = pair(name="norm")
    for k in range(CALLS + 2):
        data = batch(k, size=(1, 8, 8))
        same(gradients(plain, data), gradients(loop, data))
    for a, b in zip(plain.buffers(), loop.buffers(), strict=True):
        assert_close(b.double(), a.double(), tol=1e-12)


def test_an_optimizer_moves_what_graphs_read():
    plain, loop = pair()
    steps = [torch.optim.Adam(x.parameters(), 0.01) for x in (plain, loop)]
    for k in range(CALLS + 3):
        same(gradients(plain, batch(k)), gradients(loop, batch(k)))
        for x in steps:
            x.step()


def test_without_gradients():
    plain, loop = pair()
    with torch.no_grad():
        for k in range(CALLS + 1):
            out = loop(*batch(k))
    assert Graph.made == 1
    assert_close(out.loss, plain(*batch(CALLS)).loss.detach(), tol=1e-12)
    with torch.inference_mode():
        for _ in range(2):
            again = loop(*batch(CALLS))
    assert torch.equal(again.loss, out.loss)
    x_s, y_s, x_q, _ = batch(0)
    with torch.no_grad():
        for _ in range(CALLS + 1):
            out = loop(x_s, y_s, x_q)
    assert out.loss is None
    assert_close(out.predictions, plain(x_s, y_s, x_q).predictions, tol=1e-12)


def test_step_weights():
    plain, loop = pair()
    for k in range(CALLS + 2):
        weights = torch.tensor([0.25 * k, 1.0]).double()
        same(
            gradients(plain, batch(k), step_weights=weights),
            gradients(loop, batch(k), step_weights=weights),
        )


@pytest.mark.parametrize(
    "change",
    [
        lambda loop: setattr(loop.learner, "lr", 0.3),
        lambda loop: loop.eval(),
        lambda loop: loop.learner.module[0].weight.requires_grad_(False),
        lambda loop: setattr(loop.learner.module[0].weight, "data", torch.ones(6, 8).double()),
        lambda loop: loop.learner.module.__setitem__(1, nn.Tanh()),
    ],
    ids=["lr", "eval", "frozen", "data", "layer"],
)
def test_what_changes_is_noticed(change):
    plain, loop = pair()
    for k in range(CALLS):
        gradients(loop, batch(k))
    for each in (plain, loop):
        change(each)
    for k in range(CALLS + 1):
        a, b = plain(*batch(k)), loop(*batch(k))
        assert_close(b.loss.detach(), a.loss.detach(), tol=1e-12)
    assert Graph.made == 4


def test_shapes_and_steps_are_recorded_apart():
    plain, loop = pair()
    for _ in range(CALLS + 1):
        for tasks in (2, 3):
            for steps in (1, 2):
                data = batch(tasks, tasks)
                same(gradients(plain, data, steps=steps), gradients(loop, data, steps=steps))
    assert Graph.made == 8
    gradients(loop, batch(4, 4))
    assert len(loop.recorder._known) == recorder.MOST


def test_a_changed_parameter_is_noticed_before_its_gradient():
    _, loop = pair()
    for k in range(CALLS):
        gradients(loop, batch(k))
    loss = loop(*batch(0)).loss.sum()
    with torch.no_grad():
        next(loop.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Counting(nn.Module):
    """A model of somebody's own."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(8, 5), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x)


def test_what_may_do_something_else_is_not_recorded():
    model = fastkfo.algorithms.MAML(Counting().double(), 0.1)
    loop = recorded(fastkfo.InnerLoop(model, F.cross_entropy, 2))
    for k in range(CALLS):
        loop(*batch(k))
    assert Graph.made == 0
    assert "Counting may depend" in loop.recorder.why_not
    model = learner()
    loop = recorded(fastkfo.InnerLoop(model, lambda p, y: F.cross_entropy(p, y), 2))
    for k in range(CALLS):
        loop(*batch(k))
    assert "loss, a function of its own" in loop.recorder.why_not
    # Asked for, it is, as long as its attributes stay as they are.
    loop = recorded(fastkfo.InnerLoop(model, lambda p, y: F.cross_entropy(p, y), 2, capture=True))
    for k in range(CALLS):
        loop(*batch(k))
    assert Graph.made == 2


def test_a_refusal_is_kept_and_told(monkeypatch):
    def calls(loop, k):
        out = loop(*batch(k))
        loop.zero_grad()
        out.loss.sum().backward()
        return out, [p.grad.clone() for p in loop.parameters()]

    def refuse(self, body):
        body()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Graph, "record", refuse)
    plain, loop = pair()
    for k in range(CALLS + 2):
        same(calls(plain, k), calls(loop, k))
    assert Graph.made == 1
    assert "cannot be recorded: operation not permitted" in loop.recorder.why_not
    _, loop = pair(capture=True)
    for k in range(CALLS - 1):
        calls(loop, k)
    with pytest.raises(RuntimeError, match="capture: the inner loop cannot be recorded"):
        loop(*batch(0))


@pytest.mark.parametrize(
    "options", [{"memory": "checkpoint"}, {"chunk_size": 2}], ids=["checkpoint", "chunks"]
)
def test_what_cannot_be_recorded(options):
    _, loop = pair(**options)
    for k in range(CALLS):
        gradients(loop, batch(k))
    assert Graph.made == 0
    _, loop = pair(capture=True, **options)
    with pytest.raises(ValueError, match="capture: expected a call that can be recorded"):
        loop(*batch(0))


def test_cuda_tensors_are_asked_for(monkeypatch):
    monkeypatch.setattr(recorder, "DEVICE", "cuda")
    loop = fastkfo.InnerLoop(learner(), F.cross_entropy, 2, capture=True)
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        loop(*batch(0))


def test_copies_record_for_themselves():
    _, loop = pair()
    for k in range(CALLS):
        gradients(loop, batch(k))
    twin = copy.deepcopy(loop)
    assert len(twin.recorder._known) == 0
    assert twin.recorder is not loop.recorder


def test_a_step_of_ones_own():
    weight = torch.ones(4, requires_grad=True)
    calls = []

    def step(x):
        calls.append(1)
        return {"y": (x * weight).sum(), "x": [x + 1]}

    kinds = [(torch.Size([4]), torch.float32, torch.device("cpu"))]
    replay = Captured(step, kinds, Graph)
    found = [replay(torch.full((4,), float(k))) for k in range(5)]
    assert [x["y"].item() for x in found] == [0, 4, 8, 12, 16]
    assert found[3]["x"][0].tolist() == [4.0] * 4
    with pytest.raises(
        ValueError, match=r"tensors: expected \[4\] torch.float32 on cpu, got \[5\]"
    ):
        replay(torch.ones(5))


def test_inputs_of_a_step_are_checked(monkeypatch):
    monkeypatch.setattr(recorder, "DEVICE", "cuda")
    with pytest.raises(TypeError, match="step: expected a function, got int"):
        fastkfo.capture(3, [torch.ones(1)])
    with pytest.raises(TypeError, match="example: expected tensors, got int"):
        fastkfo.capture(print, [3])
    with pytest.raises(ValueError, match="example: expected tensors on one CUDA device, got cpu"):
        fastkfo.capture(print, [torch.ones(1)])
    with pytest.raises(ValueError, match="got no tensor"):
        fastkfo.capture(print, [])


@pytest.mark.parametrize("ours", [True, False], ids=["of the package", "somebody's"])
def test_functions_in_a_model(ours):
    model = fastkfo.vision.models.OmniglotCNN(5, hidden_size=4)  # has Lambdas of its own
    if not ours:
        model = nn.Sequential(model, fastkfo.nn.Lambda(lambda x: x))
    loop = fastkfo.InnerLoop(fastkfo.algorithms.MAML(model, 0.1), F.cross_entropy, 1)
    reason = recorder.of_loop(loop)
    assert reason is None if ours else "Lambda may depend" in reason


def both(loops, calls, function):
    """What a function of an inner loop gives, after as many calls, for both."""
    for loop in loops:
        for k in range(calls):
            gradients(loop, batch(k))
    assert loops[1].recorder.why_not is None
    for a, b in zip(*[function(loop) for loop in loops], strict=True):
        assert_close(b.detach(), a.detach(), tol=1e-10)


def test_the_gradient_of_every_task_alone():
    def each(loop):
        loss, params = loop(*batch(7)).loss, list(loop.parameters())
        return [g for x in loss for g in torch.autograd.grad(x, params, retain_graph=True)]

    both(pair(), CALLS, each)


def test_dropout_in_a_pass_that_runs_again():
    loop = recorded(
        fastkfo.InnerLoop(
            fastkfo.algorithms.MAML(
                nn.Sequential(nn.Linear(8, 6), nn.Dropout(), nn.Linear(6, 5)).double(), 0.1
            ),
            F.cross_entropy, 2, backend="batched",
        )
    )  # fmt: skip
    for k in range(CALLS):
        gradients(loop, batch(k))
    params = list(loop.parameters())
    torch.manual_seed(1)
    want = torch.autograd.grad(loop(*batch(0)).loss.sum(), params)
    after = torch.get_rng_state()
    for create in (False, True):
        torch.manual_seed(1)
        loss = loop(*batch(0)).loss.sum()
        if not create:
            loop(*batch(1))
            torch.set_rng_state(after)
        found = torch.autograd.grad(loss, params, create_graph=create)
        assert torch.equal(torch.get_rng_state(), after)
        for a, b in zip(found, want, strict=True):
            assert_close(a.detach(), b, tol=1e-10)


def test_an_input_that_depends_on_another():
    def twice(loop):
        x_s, y_s, _, y_q = batch(7)
        x_s.requires_grad_()
        scale = next(loop.parameters())[0, 0]
        loss = loop(x_s, y_s, 2 * x_s * scale, y_q).loss.sum()
        return torch.autograd.grad(loss, [x_s, *loop.parameters()], create_graph=True)

    loops = pair()
    for loop in loops:
        for _ in range(CALLS):
            twice(loop)
    both(loops, 0, twice)


def test_a_changed_loop_has_no_graph_of_an_earlier_gradient():
    _, loop = pair()
    for k in range(CALLS):
        gradients(loop, batch(k))
    loss = loop(*batch(0)).loss.sum()
    loop.learner.lr = 0.9
    with pytest.raises(RuntimeError, match="changed since the forward pass"):
        torch.autograd.grad(loss, list(loop.parameters()), create_graph=True)


def test_a_changed_frozen_parameter_is_noticed_before_the_gradient():
    _, loop = pair()
    frozen = loop.learner.module[0].weight.requires_grad_(False)
    for k in range(CALLS):
        loop(*batch(k)).loss.sum().backward()
    loss = loop(*batch(0)).loss.sum()
    frozen.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_strides_are_part_of_what_is_recorded():
    loops = [
        fastkfo.InnerLoop(
            fastkfo.algorithms.MAML(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5)).double(), 0.1),
            F.cross_entropy, 2, backend="batched", capture=capture,
        )
        for capture in (False, "auto")
    ]  # fmt: skip
    loops[1].load_state_dict(loops[0].state_dict())
    recorded(loops[1])
    both(loops, CALLS, lambda loop: [loop(*batch(1)).loss])
    for loop in loops:
        weight = loop.learner.module[0].weight
        weight.data = weight.data.t()
    both(loops, CALLS, lambda loop: [loop(*batch(1)).loss])


@pytest.mark.parametrize("capture", ["auto", True])
@pytest.mark.parametrize("what", ["rate", "closure", "loss"])
def test_what_has_no_place_in_a_recording(what, capture):
    learner_, loss = learner(), F.cross_entropy
    if what == "rate":
        learner_.lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    elif what == "closure":
        t = torch.ones((), dtype=torch.float64, requires_grad=True)
        loss = lambda p, y: F.cross_entropy(p * t, y)  # noqa: E731
    else:

        def loss(p, y):
            if Graph.recording:
                raise ValueError("not while recording")
            return F.cross_entropy(p, y)

    loop = recorded(fastkfo.InnerLoop(learner_, loss, 2, backend="batched", capture=capture))
    calls = 0
    with (
        pytest.raises((ValueError, RuntimeError), match=r"capture: ")
        if capture is True
        else (contextlib.nullcontext())
    ):
        for k in range(CALLS + 1):
            loop(*batch(k))
            calls += 1
    assert calls == (CALLS + 1 if capture == "auto" else 0 if what == "rate" else CALLS - 1)
    assert all([x.recording is None for x in loop.recorder._known.values()])


def test_a_shallow_copy_records_for_itself():
    _, loop = pair()
    for k in range(CALLS):
        gradients(loop, batch(k))
    other = copy.copy(loop)
    other.options = {**loop.options, "first_order": True}
    plain = fastkfo.InnerLoop(
        loop.learner, F.cross_entropy, 2, first_order=True, backend="batched", capture=False
    )
    same(gradients(plain, batch(0)), gradients(other, batch(0)))


def test_a_batch_of_inference_mode():
    _, loop = pair()
    with torch.inference_mode():
        data = [x + 0 for x in batch(0)]
    for _ in range(CALLS + 1):
        gradients(loop, data)
    assert Graph.made == 2


def test_switches_of_the_newer_kind():
    _, loop = pair()
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        for k in range(CALLS):
            gradients(loop, batch(k))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    gradients(loop, batch(0))
    assert len(loop.recorder._known) == 2


def test_recordings_are_let_go():
    _, loop = pair()
    for k in range(CALLS):
        gradients(loop, batch(k))
    (known,) = loop.recorder._known.values()
    recording = weakref.ref(known.recording)
    del known
    loop.capture = False
    gradients(loop, batch(0))
    gc.collect()  # of the stand-in, which keeps the function
    assert recording() is None


def test_gradients_have_memory_of_their_own():
    _, loop = pair()
    for k in range(CALLS + 1):
        _, _ = gradients(loop, batch(k))
    params = list(loop.parameters())
    versions = [p.grad._version for p in params]
    params[0].grad.mul_(1)
    assert [p.grad._version for p in params[1:]] == versions[1:]
    assert len({p.grad.untyped_storage().data_ptr() for p in params}) == len(params)


def test_statistics_show_that_they_moved():
    _, loop = pair(name="norm")
    buffer = next(loop.buffers())
    for k in range(CALLS + 1):
        before = buffer._version
        gradients(loop, batch(k, size=(1, 8, 8)))
        assert buffer._version > before


def test_lists_of_tasks_are_not_recorded():
    _, loop = pair(capture=True)
    with pytest.raises(ValueError, match="x_s is a list of tasks"):
        loop(*[list(x) for x in batch(0)])


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 cannot compile an InnerLoop")
def test_compiled():
    plain, loop = pair()
    compiled = torch.compile(loop, backend="eager")
    for k in range(CALLS):
        assert_close(compiled(*batch(k)).loss.detach(), plain(*batch(k)).loss.detach(), tol=1e-12)
