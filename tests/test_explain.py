"""What `explain` says, and that it changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.optim import PerStepLR, fused
from fastkfo.optim.inner import Adam
from tests.batches import batch, learner
from tests.cases import HAS_NATIVE, needs_native
from tests.models import build, snapshot
from tests.test_inner_loop import features, head

MAML, GBML = fastkfo.algorithms.MAML, fastkfo.algorithms.GBML
CHOSEN = "native" if HAS_NATIVE else "reference"


def said(capsys, loop, name, tasks=3):
    before = snapshot(loop)[:2]
    state = torch.get_rng_state()
    fastkfo.explain(loop, *batch(name, tasks)[:2])
    assert torch.equal(torch.get_rng_state(), state)
    assert snapshot(loop)[:2] == before
    return capsys.readouterr().out


@needs_native
def test_an_mlp_in_one_call(capsys):
    loop = fastkfo.InnerLoop(learner("mlp", "kron-psd"), F.cross_entropy, 5)
    text = said(capsys, loop, "mlp")
    assert "model: fused, all steps of all tasks and the meta-gradient in one native call" in text
    assert "nothing is kept for the meta-gradient" in text
    loop = fastkfo.InnerLoop(learner("cnn", "kron-psd"), F.cross_entropy, 5)
    assert "fused: no, Conv2d ('0', layer 1) is not a layer that is known" in said(
        capsys, loop, "cnn"
    )


def test_an_mlp(capsys):
    loop = fastkfo.InnerLoop(learner("mlp", "kron-psd"), F.cross_entropy, 5, backend="batched")
    text = said(capsys, loop, "mlp")
    assert "tasks: 3, 5 steps" in text
    assert "model: all tasks in one pass, without vmap" in text
    assert "loss: all tasks in one call" in text
    assert f"update: one kron_update ({CHOSEN} on cpu) for all parameters and tasks" in text
    assert "memory: full" in text
    assert "buffers: shared" in text
    assert "capture: none: a CUDA graph needs CUDA tensors, got cpu" in text


def test_batch_norms_attention_and_other_transforms(capsys):
    loop = fastkfo.InnerLoop(learner("cnn", "mixture"), F.cross_entropy, 1, memory="adjoint")
    text = said(capsys, loop, "cnn")
    assert "under torch.func.vmap with autograd outside" in text
    form = "one native call for all tasks" if HAS_NATIVE else "a formula per task"
    assert f"model, F.batch_norm: {form}" in text
    assert ("model, F.conv2d: one native call" in text) is HAS_NATIVE
    assert "MetaCurvatureTransform" in text
    assert "memory: adjoint" in text
    loop = fastkfo.InnerLoop(learner("transformer", "none"), F.cross_entropy, 1, capture=False)
    text = said(capsys, loop, "transformer")
    assert "the math form" in text
    assert "capture: off" in text


def test_features_and_chunks(capsys):
    loop = fastkfo.InnerLoop(
        head(fastkfo, adapt_transform=True), F.cross_entropy, 2, features=features(), chunk_size=2
    )
    text = said(capsys, loop, "cnn")
    assert "features: all samples of all tasks at once" in text
    assert "features, F.batch_norm" in text
    assert "every task with factors of its own" in text
    assert "chunk_size: 2 tasks at a time" in text


def test_what_runs_task_after_task(capsys):
    loop = fastkfo.InnerLoop(learner("lstm", "kron-psd"), F.cross_entropy, 1)
    assert "model: task after task (LSTM ('rnn')" in said(capsys, loop, "lstm")
    loop = fastkfo.InnerLoop(learner("mlp", "kron-psd"), F.cross_entropy, 1, backend="loop")
    assert "model: task after task (backend='loop')" in said(capsys, loop, "mlp")
    maml = fastkfo.algorithms.MAML(build("mlp"), lr=0.1)
    loop = fastkfo.InnerLoop(maml, nn.CrossEntropyLoss(label_smoothing=0.1), 1)
    text = said(capsys, loop, "mlp")
    assert "update: one elementwise operation per parameter" in text
    assert "loss: under torch.func.vmap" in text


def test_lists_and_bad_input(capsys):
    loop = fastkfo.InnerLoop(learner("mlp", "kron-psd"), F.cross_entropy, 1)
    x, y = batch("mlp", 2)[:2]
    fastkfo.explain(loop, [x[0], x[1, :4]], [y[0], y[1, :4]])
    assert "tasks: 2 in 2 groups of equal shapes" in capsys.readouterr().out
    with pytest.raises(TypeError, match="inner_loop: expected an InnerLoop, got GBML"):
        fastkfo.explain(loop.learner, x, y)
    with pytest.raises(ValueError, match="y_s: expected 2 tasks"):
        fastkfo.explain(loop, x, y[:1])


@pytest.mark.parametrize("path", [{"backend": "loop"}, {"memory": "checkpoint"}, {}])
def test_clipping_the_optimizer_and_rates(capsys, path):
    model = build("mlp")
    options = {"lr": PerStepLR(model, 2), "inner_optimizer": Adam(), "clip_grad_norm": 2.0}
    loop = fastkfo.InnerLoop(MAML(model, **options), F.cross_entropy, 2, **path)
    text = said(capsys, loop, "mlp")
    assert "clipping: every task's gradients, to a norm of 2.0" in text
    assert "inner optimizer: Adam(betas=(0.9, 0.999), eps=1e-08), every task" in text
    assert "lr: of every step its own, up to 2" in text
    update = "update: the optimizer and one elementwise operation per parameter\n"
    assert (update in text) is (path.get("backend") != "loop")
    lstm = MAML(build("lstm"), 0.1, clip_grad_value=3.0)
    text = said(capsys, fastkfo.InnerLoop(lstm, F.cross_entropy, 1, **path), "lstm")
    assert "task after task" in text
    assert "clipping: every number of a gradient, to ±3.0" in text


UPDATES = {
    "optimizer": (lambda model: {"inner_optimizer": Adam()}, "the optimizer and one"),
    "rates": (lambda model: {"lr": PerStepLR(model, 2)}, "one"),
    "both": (
        lambda model: {"lr": PerStepLR(model, 2), "inner_optimizer": Adam()},
        "the optimizer and one",
    ),
    "shared": (lambda model: {"lr": PerStepLR(model, 2, shared=True)}, None),
    "clipped": (lambda model: {"clip_grad_norm": 1.0, "lr": nn.Parameter(torch.ones(()))}, None),
}


@pytest.mark.parametrize("name", UPDATES)
def test_what_a_transform_is_called_for(capsys, monkeypatch, name):
    """One kron_update, or a kron_transform before the steps; as it runs."""
    make, last = UPDATES[name]
    model = build("mlp")
    transform = fastkfo.optim.KroneckerTransform(fastkfo.nn.KroneckerLinear)
    ours = GBML(model, transform, **make(model)).double()
    with_params = []
    plain = fused.kron_unchecked

    def watched(dims, alpha, groups):
        with_params.append(fused.PARAM in groups)
        return plain(dims, alpha, groups)

    monkeypatch.setattr(fused, "kron_unchecked", watched)
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, 2, backend="batched")
    loop(*batch("mlp", 3))
    assert with_params == [last is None] * 2
    what = "kron_transform" if last else "kron_update"
    rest = f"; then {last} elementwise operation per parameter" if last else ""
    expected = f"update: one {what} ({CHOSEN} on cpu) for all parameters and tasks{rest}\n"
    assert expected in said(capsys, loop, "mlp")
