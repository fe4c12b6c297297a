"""`InnerLoop` without gradients, under autocast, copied, in another dtype, to higher orders."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.inner_loop import pieces
from tests.batches import batch, learner, no_warnings
from tests.models import LR, assert_close, build, perturb
from tests.test_inner_loop import features, head

pytestmark = pytest.mark.slow

PATHS = {
    "full": {},
    "checkpoint": {"memory": "checkpoint"},
    "adjoint": {"memory": "adjoint"},
    "chunks": {"chunk_size": 3},
    "chunks-adjoint": {"chunk_size": 2, "memory": "adjoint"},
    "loop": {"backend": "loop"},
    "loop-adjoint": {"backend": "loop", "memory": "adjoint"},
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
contexts = pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"]
)
TASKS = 4


def anil(**path):
    return fastkfo.InnerLoop(head(fastkfo), F.cross_entropy, 3, features=features(), **path)


def plain(name, **options):
    def made(**path):
        return fastkfo.InnerLoop(learner(name, "kron-psd", **options), F.cross_entropy, 3, **path)

    return made


def made_maml(**path):
    maml = fastkfo.algorithms.MAML(perturb(build("mlp")), lr=LR)
    return fastkfo.InnerLoop(maml, F.cross_entropy, 3, **path)


# name -> how to build the loop, whose tasks
LOOPS = {
    "mlp": (plain("mlp"), "mlp"),
    "maml": (made_maml, "mlp"),
    "adapt": (plain("mlp", adapt_transform=True), "mlp"),
    "cnn": (plain("cnn"), "cnn"),
    "transformer": (plain("transformer"), "transformer"),
    "features": (anil, "cnn"),
}
every_loop = pytest.mark.parametrize(("made", "name"), LOOPS.values(), ids=LOOPS)


def same(found, want):
    assert found.loss.dtype == want.loss.dtype
    assert_close(found.loss.detach(), want.loss.detach(), tol=1e-12)
    assert_close(found.predictions, want.predictions, tol=1e-12)
    assert_close(found.support_loss, want.support_loss, tol=1e-12)
    assert torch.equal(found.finite, want.finite)


@every_path
@every_loop
@contexts
def test_without_gradients(context, made, name, path):
    data = batch(name, TASKS)
    want, loop, other = made(**path)(*data), made(**path), made(**path)
    with context(), no_warnings():
        out = loop(*data)
        again = other(*[x.clone() for x in data])  # made in here
    for found in (out, again):
        same(found, want)
        assert not found.loss.requires_grad
        assert not found.predictions.requires_grad
        assert not found.support_loss.requires_grad
    assert want.loss.requires_grad
    assert all(p.requires_grad and p.grad is None for p in loop.parameters())
    loop(*data).loss.sum().backward()  # and training goes on
    assert all(p.grad is not None for p in loop.parameters())


@every_path
def test_inputs_of_inference_mode_outside_of_it(path):
    data = batch("mlp", TASKS)
    with torch.inference_mode():
        made_inside = [x.clone() for x in data]
    assert made_inside[0].is_inference()
    loops = [plain("mlp")(**path) for _ in range(2)]
    outs = [loops[0](*made_inside), loops[1](*data)]
    same(*outs)
    for out in outs:
        out.loss.sum().backward()
    for p, q in zip(loops[0].parameters(), loops[1].parameters(), strict=True):
        assert_close(p.grad, q.grad)


@every_path
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0]], ids=["last", "every-step"])
@contexts
def test_step_weights_without_gradients(context, weights, path):
    data = batch("mlp", TASKS)
    want = plain("mlp")(**path)(*data, step_weights=weights)
    loop = plain("mlp")(**path)
    with context():
        same(loop(*data, step_weights=weights), want)


@every_path
@every_loop
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_predictions_alone(context, made, name, path):
    x_s, y_s, x_q, y_q = batch(name, TASKS)
    want, loop = made(**path)(x_s, y_s, x_q, y_q), made(**path)
    with context():
        out = loop(x_s, y_s, x_q)
    assert out.loss is None
    assert_close(out.predictions, want.predictions, tol=1e-12)
    assert_close(out.support_loss, want.support_loss, tol=1e-12)
    assert not out.predictions.requires_grad
    assert out.finite.tolist() == [True] * TASKS


@contexts
def test_adapt_without_gradients(context):
    """The learner comes with its graph all the same, and its model can be called."""
    x_s, y_s, x_q, y_q = batch("mlp", TASKS)
    loop = plain("mlp")()
    with context():
        adapted = loop.adapt(x_s, y_s)
        found = adapted(x_q)
        assert not found.requires_grad
    assert_close(found, loop(x_s, y_s, x_q, y_q).predictions)


RECOMPUTED = ["checkpoint", "adjoint", "chunks", "chunks-adjoint"]


def _autocast_case(kind, backend, name):
    return pytest.param(kind, backend, name, id=f"{kind}-{backend}-{name}")


# Not chunks of a loop: with the whole graph, autocast's cache gives all tasks one and the same
# bfloat16 copy of a shared parameter, in which their gradients are summed up.
AUTOCAST = [
    _autocast_case(kind, backend, name)
    for kind in LOOPS
    for backend in ("batched", "loop")
    for name in RECOMPUTED
    if backend != "loop" or "chunks" not in name
]


def under_autocast(kind, enabled=True, kept=False, **path):
    """Outcome and meta-gradients in float32; `kept`: chunks keep their graphs."""
    made, name = LOOPS[kind]
    data = [x.float() if x.is_floating_point() else x for x in batch(name, TASKS)]
    loop = made(**path).float()
    run = pieces.run_pieces
    with pytest.MonkeyPatch.context() as patch:
        if kept:  # the same sizes, so that every product is the same
            patch.setattr(
                "fastkfo.inner_loop.inner_loop.run_pieces", lambda *args: run(*args[:-1], False)
            )
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = loop(*data)
    out.loss.sum().backward()  # outside of it, as PyTorch advises
    return out, torch.cat([p.grad.flatten() for p in loop.parameters()])


@pytest.mark.parametrize(("kind", "backend", "name"), AUTOCAST)
def test_autocast(kind, backend, name):
    path = PATHS[name] | {"backend": backend}
    out, found = under_autocast(kind, **path)
    want_out, want = under_autocast(kind, kept=True, **(path | {"memory": "full"}))
    _, exact = under_autocast(kind, enabled=False, **path)
    assert_close(out.loss.detach(), want_out.loss.detach(), tol=1e-5)
    assert_close(found, want, tol=1e-5)
    assert (found - exact).norm() > 1e-3 * exact.norm(), "nothing was cast"
    assert out.loss.dtype == out.support_loss.dtype == torch.float32
    assert all(x.isfinite().all() for x in (out.loss, out.predictions, out.support_loss, found))
    assert out.finite.tolist() == [True] * TASKS


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda loop: pickle.loads(pickle.dumps(loop))}


def copied():
    """Each loop on each path, copied in one of the two ways."""
    for (k, kind), (p, path) in itertools.product(enumerate(LOOPS), enumerate(PATHS)):
        yield list(COPIES)[(k + p) % 2], kind, path


@pytest.mark.parametrize(("way", "kind", "path"), list(copied()))
def test_copies(way, kind, path):
    made, name = LOOPS[kind]
    data = batch(name, TASKS)
    loop = made(**PATHS[path])
    loop(*data).loss.sum().backward()  # what a call has remembered does not stand in the way
    other = COPIES[way](loop)
    assert repr(other) == repr(loop)
    loop.zero_grad()
    other.zero_grad()
    want, found = loop(*data), other(*data)
    same(found, want)
    found.loss.sum().backward()
    assert all(p.grad is None for p in loop.parameters())
    want.loss.sum().backward()
    for p, q in zip(other.parameters(), loop.parameters(), strict=True):
        assert p is not q
        assert_close(p.grad, q.grad, tol=1e-12)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    assert_close(loop(*data).loss.detach(), want.loss.detach(), tol=1e-12)
    assert not torch.allclose(other(*data).loss, want.loss)


def test_state_dict():
    loop = fastkfo.InnerLoop(
        learner("mlp", "kron-psd"), F.cross_entropy, 3, features=nn.BatchNorm1d(4).double()
    )
    state = loop.state_dict()
    assert {"learner.module.0.weight", "learner.module.2.bias", "features.running_mean"} <= set(
        state
    )
    assert all(key.startswith(("learner.", "features.")) for key in state)
    inner = {f"learner.{key}" for key in loop.learner.state_dict()}
    assert inner == {key for key in state if key.startswith("learner.")}
    assert {key for key, _ in loop.named_parameters()} <= set(state)

    other = fastkfo.InnerLoop(
        learner("mlp", "kron-psd"), F.cross_entropy, 3, features=nn.BatchNorm1d(4).double()
    )
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3)
    data = batch("mlp", TASKS)
    assert not torch.allclose(other(*data).loss, loop(*data).loss)
    other.load_state_dict(state, strict=True)
    same(other(*data), loop(*data))


@every_path
@every_loop
def test_another_dtype(made, name, path):
    """A loop in float32 becomes one in float64, called before or not."""
    data = batch(name, TASKS)
    loop = made(**path).float()
    low = [x.float() if x.is_floating_point() else x for x in data]
    assert loop(*low).loss.dtype == torch.float32
    want = made(**path)
    with torch.no_grad():
        for module in (want, loop):
            for p in module.parameters():  # what float32 holds exactly
                p.copy_(p.float())
            for b in module.buffers():
                b.zero_()
    assert loop.to(torch.float64) is loop
    assert all(p.dtype == torch.float64 for p in loop.parameters())
    out, wanted = loop(*data), want(*data)
    assert out.loss.dtype == torch.float64
    same(out, wanted)
    out.loss.sum().backward()
    wanted.loss.sum().backward()
    for p, q in zip(loop.parameters(), want.parameters(), strict=True):
        assert_close(p.grad, q.grad, tol=1e-12)
    pairs = zip(loop.named_buffers(), want.buffers(), strict=True)
    for (key, a), b in pairs:
        assert_close(a.double(), b.double(), tol=1e-12, what=key)


def meta_gradient(loop, data):
    params = [p for p in loop.parameters() if p.requires_grad]
    return torch.autograd.grad(loop(*data).loss.sum(), params, create_graph=True)


@pytest.mark.parametrize("backend", ["batched", "loop"])
@pytest.mark.parametrize("kind", ["mlp", "maml", "adapt", "features"])
def test_a_third_derivative(kind, backend):
    """The derivative of |meta-gradient|² is that of central differences."""
    made, name = LOOPS[kind]
    loop, data = made(backend=backend), batch(name, 2)
    params = list(loop.parameters())

    def square():
        return sum(g.square().sum() for g in meta_gradient(loop, data))

    found = torch.autograd.grad(square(), params)
    assert sum(g.abs().sum() for g in found) > 0
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        way = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
        size, values = 1e-5, []
        for sign in (1, -1, -1, 1):
            with torch.no_grad():
                torch._foreach_add_(params, way, alpha=sign * size)
            values.append(square().item())
        slope = (values[0] - values[2]) / (2 * size)
        want = sum((g * w).sum() for g, w in zip(found, way, strict=True))
        assert slope == pytest.approx(want.item(), rel=1e-6)


again = pytest.mark.parametrize("name", [*RECOMPUTED, "loop-adjoint"])


@again
def test_a_second_derivative_is_not_left_out(name):
    loop, data = plain("mlp")(**PATHS[name]), batch("mlp", TASKS)
    with pytest.raises(RuntimeError, match="expected memory='full' without chunks"):
        meta_gradient(loop, data)
