"""`fastkfo.per_task`: a loss of T tasks is what a loop over the tasks gives, to second order."""

import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from fastkfo import per_task
from fastkfo.inner_loop import loss as module
from tests.dense import assert_near, derivatives

T, S, C = 3, 5, 4


def double(*shape):
    return torch.randn(shape).double().requires_grad_()


def labels(*shape, classes=C):
    return torch.randint(classes, shape)


def ignored():
    """One label in five does not count; a task has others."""
    y = labels(T, S)
    y[:, 1], y[2, 3] = -100, -100
    return y


def smooth(predictions, targets):
    return F.cross_entropy(predictions, targets, label_smoothing=0.1)


def of_dict(predictions, targets):
    return (predictions["a"] * targets["x"]).sum() + predictions["b"].square().mean()


def of_tuple(predictions, targets):
    (a, b), scale = predictions, targets[0]
    return (a.tanh() * scale).sum() * b.sum()


class Doubled(nn.CrossEntropyLoss):
    def forward(self, predictions, targets):
        return 2 * super().forward(predictions, targets)


def hooked():
    loss = nn.CrossEntropyLoss()
    loss.register_forward_hook(lambda module, args, result: 3 * result)
    return loss


def hooked_before():
    loss = nn.MSELoss()
    loss.register_forward_pre_hook(lambda module, args: (2 * args[0], args[1]))
    return loss


def replaced():
    loss = nn.CrossEntropyLoss()
    loss.forward = lambda predictions, targets: predictions.square().mean()
    return loss


KERNELS = {
    "cross_entropy": lambda: (F.cross_entropy, double(T, S, C), labels(T, S)),
    "CrossEntropyLoss": lambda: (nn.CrossEntropyLoss(), double(T, S, C), labels(T, S)),
    "cross_entropy_of_one_sample": lambda: (F.cross_entropy, double(T, 1, C), labels(T, 1)),
    "cross_entropy_of_one_task": lambda: (F.cross_entropy, double(1, S, C), labels(1, S)),
    "mse_loss": lambda: (F.mse_loss, double(T, S, 2), double(T, S, 2)),
    "mse_loss_of_numbers": lambda: (F.mse_loss, double(T, S), double(T, S)),
    "mse_loss_of_images": lambda: (F.mse_loss, double(T, 2, 3, 4, 5), double(T, 2, 3, 4, 5)),
    "MSELoss": lambda: (nn.MSELoss(), double(T, S, 2), double(T, S, 2)),
}
# A kernel that does not take such operands.
PASSED_ON = {
    "ignored_labels": lambda: (F.cross_entropy, double(T, S, C), ignored()),
    "probabilities": lambda: (F.cross_entropy, double(T, S, C), torch.rand(T, S, C).double()),
    "pixels": lambda: (F.cross_entropy, double(T, S, C, 2), labels(T, S, 2)),
    "one_sample_without_an_axis": lambda: (F.cross_entropy, double(T, C), labels(T)),
    "mse_of_one_number": lambda: (F.mse_loss, double(T), double(T)),
}
GENERAL = {
    "label_smoothing": lambda: (smooth, double(T, S, C), labels(T, S)),
    "smoothing_module": lambda: (
        nn.CrossEntropyLoss(label_smoothing=0.2),
        double(T, S, C),
        labels(T, S),
    ),
    "weights": lambda: (
        nn.CrossEntropyLoss(torch.arange(4.0).double()),
        double(T, S, C),
        labels(T, S),
    ),
    "ignore_index": lambda: (nn.CrossEntropyLoss(ignore_index=1), double(T, S, C), labels(T, S)),
    "sum": lambda: (nn.CrossEntropyLoss(reduction="sum"), double(T, S, C), labels(T, S)),
    "mse_sum": lambda: (nn.MSELoss(reduction="sum"), double(T, S), double(T, S)),
    "nll_loss": lambda: (F.nll_loss, double(T, S, C), labels(T, S)),
    "l1_loss": lambda: (F.l1_loss, double(T, S, 2), double(T, S, 2)),
    "lambda": lambda: (lambda p, t: ((p - t) ** 4).sum(), double(T, S), double(T, S)),
    "dict": lambda: (of_dict, {"a": double(T, S), "b": double(T, 2)}, {"x": double(T, S)}),
    "tuple": lambda: (of_tuple, (double(T, S), double(T, 2, 2)), [double(T, 1)]),
    "subclass": lambda: (Doubled(), double(T, S, C), labels(T, S)),
    "hook": lambda: (hooked(), double(T, S, C), labels(T, S)),
    "pre_hook": lambda: (hooked_before(), double(T, S), double(T, S)),
    "forward_of_the_instance": lambda: (replaced(), double(T, S, C), labels(T, S)),
}


def rows(tree, t):
    return tree_map(lambda x: x[t], tree)


def loop(loss, *args):
    """The oracle."""
    first = tree_leaves(args)[0]
    return torch.stack([loss(*rows(args, t)) for t in range(len(first))])


def compare(batched, loss, *args, tolerance=1e-10):
    tensors = [x for x in tree_leaves(args) if x.requires_grad]
    results = [
        (out, *derivatives([out], tensors, 2)) for out in (batched(*args), loop(loss, *args))
    ]
    for k, (a, e) in enumerate(zip(*results, strict=True)):
        assert a.dtype == e.dtype
        assert_near(a, e, tolerance, f"[{k}]")


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("case", KERNELS.values(), ids=KERNELS)
def test_kernels(case, no_warnings, monkeypatch):
    loss, predictions, targets = case()
    batched = per_task(loss)
    assert batched.has_kernel
    monkeypatch.setattr(batched, "_general", None)  # a kernel does without
    compare(batched, loss, predictions, targets)


@pytest.mark.parametrize("case", PASSED_ON.values(), ids=PASSED_ON)
def test_what_a_kernel_passes_on(case, no_warnings):
    loss, predictions, targets = case()
    batched = per_task(loss)
    assert batched.has_kernel
    compare(batched, loss, predictions, targets)
    assert not batched.each


@pytest.mark.parametrize("case", GENERAL.values(), ids=GENERAL)
def test_general_losses(case, no_warnings):
    loss, predictions, targets = case()
    batched = per_task(loss)
    assert not batched.has_kernel
    compare(batched, loss, predictions, targets)
    assert not batched.each


def test_non_contiguous_operands():
    z, y = double(C, T, S), labels(S, T)
    compare(per_task(F.cross_entropy), F.cross_entropy, z.permute(1, 2, 0), y.mT)
    a, b = double(S, T), double(T, 1)
    compare(per_task(F.mse_loss), F.mse_loss, a.mT, b.expand(T, S))


def test_more_arguments():
    def weighted(predictions, targets, weight):
        return (weight * (predictions - targets)).abs().sum()

    compare(per_task(weighted), weighted, double(T, S), double(T, S), double(T))
    arguments = double(T, S, C), labels(T, S), torch.rand(T, C).double()
    compare(per_task(F.cross_entropy), F.cross_entropy, *arguments)


def with_a_look(predictions, targets):
    """vmap refuses `.item()`."""
    distance = predictions - targets
    return distance.abs().sum() if distance.sum().item() > 0 else distance.square().sum()


def of_a_mask(predictions, targets):
    """vmap refuses a shape that depends on values."""
    return predictions[targets > 0].square().sum()


@pytest.mark.parametrize("loss", [with_a_look, of_a_mask])
def test_a_loss_that_vmap_refuses(loss):
    batched, a, b = per_task(loss), double(T, S), torch.randn(T, S).double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            compare(batched, loss, a, b)
    (warning,) = [str(w.message) for w in caught]
    assert f"the loss {loss.__name__} runs task after task" in warning
    assert "vmap: " in warning  # the reason, in PyTorch's words
    assert batched.each


def test_a_module_that_vmap_refuses_is_named():
    class Picky(nn.Module):
        def forward(self, predictions, targets):
            return with_a_look(predictions, targets)

    with pytest.warns(UserWarning, match="the loss Picky runs task after task"):
        compare(per_task(Picky()), Picky(), double(T, S), double(T, S))


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError])
def test_an_error_of_the_loss_is_its_own(error, no_warnings):
    def broken(predictions, targets):
        raise error("of the loss")

    batched = per_task(broken)
    with pytest.raises(error, match="of the loss"):
        batched(double(T, S), double(T, S))
    assert not batched.each


def test_randomness_differs_between_tasks():
    out = per_task(lambda p, t: F.dropout(p, 0.5).sum())(torch.ones(64, 9), torch.ones(64))
    assert len(set(out.tolist())) > 1


def test_no_tasks():
    losses = per_task(F.cross_entropy)(torch.ones(0, S, C), labels(0, S))
    assert losses.shape == (0,)
    assert per_task(F.mse_loss)(torch.ones(0, S), torch.ones(0, S)).shape == (0,)


def test_per_task_twice_is_the_same_object():
    batched = per_task(F.l1_loss)
    assert per_task(batched) is batched
    assert per_task(F.cross_entropy) is not per_task(F.cross_entropy)


@pytest.mark.parametrize(("loss", "name"), [(3, "int"), (None, "NoneType"), ("mse", "str")])
def test_not_callable(loss, name):
    with pytest.raises(TypeError, match=f"loss: expected a callable, got {name}"):
        per_task(loss)


@pytest.mark.parametrize(("reduction", "got"), [("none", r"\[5\]"), ("matrix", r"\[5, 2\]")])
def test_more_than_one_number_per_task(reduction, got):
    def loss(predictions, targets):
        distance = (predictions - targets).abs()
        return distance.sum(-1) if reduction == "none" else distance

    with pytest.raises(ValueError, match=f"loss: expected one number per task, got {got}"):
        per_task(loss)(double(T, S, 2), double(T, S, 2))


def test_more_than_one_number_where_vmap_refuses():
    def loss(predictions, targets):
        return (predictions - targets) * (1 if targets.sum().item() else 2)

    with (
        pytest.warns(UserWarning, match="task after task"),
        pytest.raises(ValueError, match=r"loss: expected one number per task, got \[5\]"),
    ):
        per_task(loss)(double(T, S), double(T, S))


@pytest.mark.parametrize("bad", [C, -1, -101, 2**40])
@pytest.mark.parametrize("others_ignored", [False, True], ids=["all_count", "some_ignored"])
def test_labels_out_of_range(bad, others_ignored):
    y = ignored() if others_ignored else labels(T, S)
    y[1, 2] = bad
    with pytest.raises(ValueError, match=rf"targets: expected labels from 0 to 3, got {bad}"):
        per_task(F.cross_entropy)(double(T, S, C), y)


@pytest.mark.parametrize(
    ("loss", "predictions", "targets"),
    [
        (F.cross_entropy, (T, S, C), torch.zeros(T, S + 1).long()),
        (F.cross_entropy, (T, S, C), torch.zeros(T + 1, S).long()),
        (F.mse_loss, (T, S), torch.ones(T + 1, S)),
        (F.l1_loss, (T, S), torch.ones(T + 1, S)),
    ],
    ids=["samples", "tasks", "tasks_of_mse", "tasks_of_others"],
)
def test_shapes_that_do_not_match(loss, predictions, targets):
    with pytest.raises(ValueError, match="size"):
        per_task(loss)(torch.ones(predictions), targets)


def test_labels_are_looked_at_once_until_they_change(monkeypatch):
    looks = []
    look = module.check_range
    monkeypatch.setattr(module, "check_range", lambda *a: (looks.append(a), look(*a)))
    batched, z, y = per_task(F.cross_entropy), double(T, S, C), labels(T, S)
    batched(z, y)
    batched(z, y)
    assert len(looks) == 1
    y[0, 0] = C - 1
    batched(z, y)
    assert len(looks) == 2
    y[0, 0] = C
    with pytest.raises(ValueError, match=r"targets: .*got 4"):
        batched(z, y)
    y[0, 0] = 0
    batched(z, y)
    with pytest.raises(ValueError, match=r"targets: .*got 7"):
        batched(z, torch.full_like(y, 7))
    y[0, 0] = C - 1
    batched(z, y)
    with pytest.raises(ValueError, match=r"targets: .*0 to 2, got 3"):
        batched(z[..., :-1], y)
    y[0, 0] = -100  # now F.cross_entropy's own
    compare(batched, F.cross_entropy, z, y)


def test_labels_are_not_kept_alive():
    batched, y = per_task(F.cross_entropy), labels(T, S)
    batched(double(T, S, C), y)
    alive = weakref.ref(y)
    del y
    assert alive() is None


@torch.inference_mode()
def test_labels_of_inference_mode():
    z, y = torch.randn(T, S, C).double(), labels(T, S)
    batched = per_task(F.cross_entropy)
    for _ in range(2):
        assert_near(batched(z, y), loop(F.cross_entropy, z, y), 1e-10)
    y[0, 0] = C
    with pytest.raises(ValueError, match=r"targets: .*got 4"):
        batched(z, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss])
def test_autocast(loss, dtype):
    """As PyTorch does: these losses are float32 and as exact, whatever enters."""
    z = torch.randn(T, S, C).to(dtype)
    y = labels(T, S) if loss is F.cross_entropy else torch.randn(T, S, C).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, expected = per_task(loss)(z, y), loop(loss, z, y)
    assert ours.dtype == expected.dtype
    assert_near(ours, expected, 1e-6)


def test_where_labels_are_not_looked_at(device):
    """What runs on a GPU: ignored labels do not count, a task with a wrong one is NaN."""
    z = double(T, S, C).detach().to(device).requires_grad_()
    y = ignored().to(device)
    compare(module._without_a_look, F.cross_entropy, z, y)
    wrong = y.clone()
    wrong[1, 0] = C
    losses = module._without_a_look(z, wrong)
    assert losses.isnan().tolist() == [False, True, False]
    (g,) = torch.autograd.grad(losses[[0, 2]].sum(), z)
    (e,) = torch.autograd.grad(loop(F.cross_entropy, z, y)[[0, 2]].sum(), z)
    assert_near(g, e, 1e-10)
    y[0] = -100  # nothing counts, as in F.cross_entropy
    assert module._without_a_look(z, y).isnan().tolist() == [True, False, False]
