"""Tensors on two devices: an error that names the argument and both, before anything is changed.

"meta", a device without memory, stands in for the second one, so that this runs everywhere; with a
GPU the learner is on it, too.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.functional import Layer
from fastkfo.inner_loop import recorder
from fastkfo.inner_loop.captured import Captured
from tests.graphs_on_cpu import Graph
from tests.inner_loop_cases import case
from tests.recorded_loops import CALLS, batch, gradients, on_cpu, pair

NAMES = ("x_s", "y_s", "x_q", "y_q")
PATHS = [
    {},
    {"backend": "batched"},
    {"backend": "loop"},
    {"backend": "batched", "memory": "adjoint"},
    {"backend": "batched", "chunk_size": 2},
]


def learner(device="cpu", norm=False, **options):
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))
    if norm:
        model.insert(2, nn.BatchNorm1d(6))
    update = fastkfo.optim.KroneckerTransform(fastkfo.nn.KroneckerLinear)
    return fastkfo.algorithms.GBML(model, update, lr=0.1, **options).to(device)


def tasks(device="cpu"):
    x = torch.randn(2, 3, 10, 8, device=device)
    y = torch.randint(5, (2, 3, 10), device=device)
    return {"x_s": x[0], "y_s": y[0], "x_q": x[1], "y_q": y[1]}


def elsewhere(message, function, *args, **kwargs):
    with pytest.raises(ValueError, match=message + r"\b.* got .*meta"):
        function(*args, **kwargs)


@pytest.mark.parametrize("norm", [False, True], ids=["mlp", "norm"])
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("names", [*[(x,) for x in NAMES], NAMES], ids="-".join)
def test_a_batch(names, path, norm, device):
    loop = fastkfo.InnerLoop(learner(device, norm), F.cross_entropy, 2, **path)
    given = tasks(device)
    away = given | {name: given[name].to("meta") for name in names}
    before = [x.clone() for x in (*loop.parameters(), *loop.buffers())]
    state = torch.get_rng_state()
    message = f"^{names[0]}: expected device {device.type}"
    elsewhere(message, loop, **away)
    elsewhere(message, loop, **{name: list(x) for name, x in away.items()})
    if names[0] in ("x_s", "y_s"):
        elsewhere(message, loop.adapt, away["x_s"], away["y_s"])
        elsewhere(message, fastkfo.explain, loop, away["x_s"], away["y_s"])
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip((*loop.parameters(), *loop.buffers()), before, strict=True):
        assert torch.equal(a, b)
    loop(**given).loss.sum().backward()


def test_integers_within_a_dict_may_be_elsewhere():
    class OfRows(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 5)

        def forward(self, given):
            return self.linear(given["x"])

    loop = fastkfo.InnerLoop(fastkfo.algorithms.MAML(OfRows(), 0.1), F.cross_entropy, 1)
    rows, given = torch.ones(3, 10, dtype=torch.int64, device="meta"), tasks()
    x_s, x_q = ({"x": given[k], "rows": rows} for k in ("x_s", "x_q"))
    assert loop(x_s, given["y_s"], x_q, given["y_q"]).finite.all()
    x_s["rows"] = rows.float()
    elsewhere("^x_s: expected device cpu", loop, x_s, given["y_s"], x_q, given["y_q"])


def test_a_model_on_two_devices_moves_its_inputs_itself():
    ours = learner()
    ours.module.append(nn.Linear(5, 5, device="meta"))
    with pytest.raises(RuntimeError):  # PyTorch's own: what goes where is not known here
        fastkfo.InnerLoop(ours, F.cross_entropy, 1, backend="loop")(**tasks())


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("adapt", [False, True], ids=["fixed", "adapt"])
def test_factors(path, adapt, device):
    ours = learner(device, norm=True, adapt_transform=adapt)
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, 2, **path)
    ours.compute_update.to("meta")
    before = [x.clone() for x in loop.buffers()]
    elsewhere(f"transform's left for parameter 0: expected device {device.type}", loop,
              **tasks(device))  # fmt: skip
    assert all([torch.equal(a, b) for a, b in zip(loop.buffers(), before, strict=True)])


@pytest.mark.parametrize("backend", ["auto", "batched", "loop"])
@pytest.mark.parametrize("of", ["gbml", "maml", "sgd"])
def test_learning_rates(of, backend, device):
    ours = learner(device)
    if of == "gbml":
        ours.lr = torch.tensor(0.1, device="meta")
    elif of == "maml":
        ours = fastkfo.algorithms.MAML(ours.module, lr=torch.tensor(0.1, device="meta"))
    else:
        ours = fastkfo.algorithms.MetaSGD(ours.module)
        ours.lrs.to("meta")
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, 2, backend=backend)
    elsewhere(f"lr for parameter 0: expected device {device.type}", loop, **tasks(device))


def test_features_losses_and_weights(device):
    expected = f": expected device {device.type}"
    given = tasks(device)
    features = nn.Linear(8, 8, device="meta")
    loop = fastkfo.InnerLoop(learner(device), F.cross_entropy, 1, features=features)
    elsewhere(f"^features{expected}", loop, **given)
    elsewhere(f"^features{expected}", loop.adapt, given["x_s"], given["y_s"])

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), device="meta"))

        def forward(self, predictions, targets):
            return F.cross_entropy(predictions * self.scale, targets)

    elsewhere(f"^loss{expected}", fastkfo.InnerLoop(learner(device), Scaled(), 1), **given)
    loop = fastkfo.InnerLoop(learner(device), F.cross_entropy, 1, query_loss=Scaled())
    elsewhere(f"^query_loss{expected}", loop, **given)
    loop = fastkfo.InnerLoop(learner(device), F.cross_entropy, 2)
    elsewhere(f"^step_weights{expected}", loop, **given, step_weights=torch.ones(2, device="meta"))
    assert loop(**given, step_weights=torch.ones(2)).finite.all()


@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss], ids=["labels", "squares"])
def test_a_batched_learner(loss, device):
    clone = learner(device, norm=True).clone(tasks=3)
    given = tasks(device)
    elsewhere(f"^inputs: expected device {device.type}", clone, given["x_s"].to("meta"))
    y = given["y_s"] if loss is F.cross_entropy else torch.randn(3, 10, 5)
    predictions = clone(given["x_s"])
    of_tasks = fastkfo.per_task(loss)
    elsewhere(f"^targets: expected device {device.type}", of_tasks, predictions, y.to("meta"))
    clone.adapt(of_tasks(predictions, y.to(device)))


@pytest.mark.parametrize("place", range(4), ids=NAMES)
def test_the_data_of_the_fused_op(place, device):
    c = case("two layers", "psd", device=device)
    c.data[place] = c.data[place].detach().to("meta")
    # With x_s elsewhere it is all others that are.
    expected = rf"^{NAMES[place]}: .* {device.type}.* got meta" if place else "^x_q: .*meta as x_s"
    with pytest.raises(ValueError, match=expected):
        c()


@pytest.mark.parametrize("name", ["left", "right", "bias", "scale", "theta"])
def test_the_operands_of_the_fused_op(name, device):
    c = case("two layers", "all", device=device)
    group = c.theta if name == "theta" else c.groups[name]
    group[0] = group[0].detach().to("meta")
    elsewhere(f"^{name} of parameter 0: expected device {device.type}", c)


def test_the_rate_of_the_fused_op(device):
    x, y = torch.randn(2, 3, 4, device=device), torch.zeros(2, 3, dtype=torch.int64, device=device)
    theta = [torch.randn(5, 4, device=device)]
    for scale in (None, [torch.ones(5, 4, device=device)]):
        elsewhere(
            f"^lr of parameter 0: expected device {device.type}", fastkfo.functional.inner_loop,
            [Layer("linear", 4, 5, weight=0)], theta, x, y, steps=1, scale=scale,
            lr=torch.tensor(0.1, device="meta"),
        )  # fmt: skip


@pytest.mark.parametrize("operand", ["weight", "bias"])
@pytest.mark.parametrize("op", ["conv2d", "linear", "batch_norm", "layer_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers(op, operand, dtype, device):
    x = torch.randn(2, 3, 4, 5, 5, device=device, dtype=dtype)
    shapes = {"conv2d": (2, 6, 4, 3, 3), "linear": (2, 6, 5), "batch_norm": (2, 4)}
    weight = torch.ones(shapes.get(op, (2, 5)), dtype=dtype, device=device)
    bias = torch.ones(weight.shape[:2], dtype=dtype, device=device)
    given = {"weight": weight, "bias": bias}
    given[operand] = given[operand].to("meta")
    run = getattr(fastkfo.functional, op)
    elsewhere(f"^{operand}: expected device {device.type}.* as x", run, x, **given)


def test_a_batch_elsewhere_costs_no_recording(monkeypatch):
    on_cpu(monkeypatch)
    plain, loop = pair()
    for k in range(CALLS):
        gradients(loop, batch(k))
    for place, name in enumerate(NAMES):
        away = list(batch(0))
        away[place] = away[place].to("meta")
        elsewhere(f"^{name}: expected device cpu", loop, *away)
    assert Graph.made == 2
    out, _ = gradients(loop, batch(7))
    assert Graph.made == 2
    torch.testing.assert_close(out.loss, plain(*batch(7)).loss)


def test_a_loop_that_moved_away_lets_go_of_its_recordings(monkeypatch):
    on_cpu(monkeypatch)
    _, loop = pair(backend="loop")
    for k in range(CALLS):
        gradients(loop, batch(k))
    monkeypatch.setattr(recorder, "DEVICE", "cuda")  # where it is no longer
    assert loop(*batch(0)).finite.all()
    assert not loop.recorder._known


def test_a_step_of_ones_own(monkeypatch):
    monkeypatch.setattr(recorder, "DEVICE", "cpu")
    kinds = [(torch.Size([2]), torch.float32, torch.device("cpu"))] * 2
    replay = Captured(lambda a, b: a + b, kinds, Graph)
    one = torch.ones(2)
    for k in range(CALLS + 1):
        assert replay(one, k * one).tolist() == [k + 1.0] * 2
        elsewhere(r"^tensors: expected \[2\] torch.float32 on cpu", replay, one, one.to("meta"))
    with pytest.raises(TypeError, match="tensors: expected tensors, got int"):
        replay(one, 3)
    with pytest.raises(ValueError, match="on one CUDA device, got cpu, meta"):
        fastkfo.capture(print, [one, one.to("meta")])
