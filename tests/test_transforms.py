"""Transforms one by one, when they are fused and when called, and what a clone may cache."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

import fastkfo
from fastkfo.algorithms import GBML
from fastkfo.nn import KroneckerLinear, Scale
from fastkfo.optim import KroneckerTransform, clone_cache, fused
from fastkfo.optim.transforms import (
    MetaCurvatureTransform,
    ModuleTransform,
    ReshapedTransform,
    TransformDictionary,
)
from tests.models import (
    LR,
    TRANSFORMS,
    assert_close,
    assert_same,
    build,
    learner_of,
    meta_iteration,
    perturb,
    query_loss,
    snapshot,
    support_loss,
)
from tests.oracle import learn2learn

l2l = learn2learn()
SHAPES = [(), (5,), (3, 4), (4, 3, 2, 3), (4, 3, 5), (2, 3, 2, 1, 2)]
SHAPE_IDS = ["0d", "1d", "2d", "4d", "3d", "5d"]


# --------------------------------------------------------------------------------- forward and keys


@pytest.mark.parametrize("kind", ["kron-psd-bias", "kron", "curvature", "module", "scale"])
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=SHAPE_IDS[1:4])
def test_forward_equals_learn2learn(shape, kind):
    param, grad = torch.randn(2, *shape, dtype=torch.float64)
    made = [perturb(TRANSFORMS[kind](lib, None)(param).double()) for lib in (fastkfo, l2l)]
    made[1].load_state_dict(made[0].state_dict())  # a random one, for nn.Linear
    assert [n for n, _ in made[0].named_parameters()] == [n for n, _ in made[1].named_parameters()]
    assert_close(made[0](grad), made[1](grad), tol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", ["kron-psd-bias", "kron", "curvature", "module"])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_made_in_the_parameter_s_dtype(shape, kind, dtype):
    if kind == "curvature" and not shape:
        with pytest.raises(NotImplementedError, match="one axis or more"):
            MetaCurvatureTransform(torch.tensor(1.0))
        return
    grad = torch.randn(shape, dtype=dtype)
    transform = TRANSFORMS[kind](fastkfo, None)(grad)
    assert {p.dtype for p in transform.parameters()} == {dtype}
    assert transform(grad).shape == grad.shape
    if kind != "module":
        assert torch.equal(transform(grad), grad)  # the identity, bit for bit


def test_any_strides():
    grad = torch.randn(4, 3, 2, 3, dtype=torch.float64)
    last = grad.to(memory_format=torch.channels_last)
    for kind in ("kron-psd-bias", "curvature", "module"):
        transform = perturb(TRANSFORMS[kind](fastkfo, None)(grad))
        assert_close(transform(last), transform(grad), tol=1e-14)


def test_dictionary():
    model = build("mlp")
    kron = KroneckerTransform(KroneckerLinear)
    lookup = TransformDictionary({model[0]: kron, model[2].bias: MetaCurvatureTransform})
    kinds = [type(lookup(p)) for p in model.parameters()]
    assert kinds == [ReshapedTransform, ReshapedTransform, type(None), MetaCurvatureTransform]
    with pytest.raises(ValueError, match=r"dictionary: expected keys .* got str"):
        TransformDictionary({"weight": kron})


@pytest.mark.parametrize("bad", [torch.arange(3), 3, None], ids=["integers", "int", "none"])
def test_bad_parameters(bad):
    kron, module = KroneckerTransform(KroneckerLinear), ModuleTransform(nn.Linear)
    for maker in (kron, MetaCurvatureTransform, module):
        with pytest.raises(TypeError, match="param: expected a "):
            maker(bad)


# ---------------------------------------------------------------------------------- fused or called


def forbid(monkeypatch, *classes):
    """Make the forward of these classes an error, which the fused path never notices."""

    def forward(self, *args):
        raise AssertionError(f"{type(self).__name__} was called")

    for cls in classes:
        monkeypatch.setattr(cls, "forward", forward)


@pytest.mark.parametrize("lib", [fastkfo, l2l], ids=["ours", "theirs"])
@pytest.mark.parametrize("transform", ["kron-psd-bias", "kron", "curvature", "scale"])
@pytest.mark.parametrize("options", [{}, {"adapt_transform": True}], ids=["fixed", "adapt"])
def test_known_transforms_are_fused(monkeypatch, lib, transform, options):
    model = build("cnn")
    learner = GBML(model, TRANSFORMS[transform](lib, model), lr=LR, **options).double()
    want = meta_iteration(perturb(copy.deepcopy(learner)), "cnn")
    forbid(
        monkeypatch,
        lib.optim.transforms.ReshapedTransform,
        lib.optim.transforms.MetaCurvatureTransform,
        lib.nn.KroneckerLinear,
        lib.nn.Scale,
    )
    assert_same(meta_iteration(perturb(learner), "cnn"), want)


@pytest.mark.parametrize("options", [{}, {"first_order": True}], ids=["second", "first"])
def test_one_call_of_the_op_for_all_parameters(monkeypatch, options):
    calls = []
    for module, name in ((fused, "kron_unchecked"), (clone_cache, "apply")):  # gathered or repeated
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, run=run: calls.append(1) or run(*a))
    clone = learner_of(fastkfo, "cnn", "kron-psd", **options).clone()
    for step in range(3):
        clone.adapt(support_loss(clone, "cnn"))
        assert len(calls) == step + 1


class Doubled(KroneckerLinear):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Reshaped(ReshapedTransform):
    def forward(self, grad):
        return 3 * super().forward(grad)


class Times(nn.Module):
    """A parametrization."""

    def forward(self, x):
        return 2 * x


def instance_forward(module, linear, called):
    forward = linear.forward
    linear.forward = lambda x: called.append(1) or 2 * forward(x)


def parametrized(module, linear, called):
    parametrize.register_parametrization(linear, "left", Times())
    called.append(1)


def as_buffer(module, linear, called):
    left = linear._parameters.pop("left")
    linear.register_buffer("left", 2 * left.detach())
    called.append(1)


NOT_FUSED = {
    "forward-hook": lambda m, k, c: m.register_forward_hook(lambda *a: c.append(1) or 2 * a[2]),
    "inner-forward-hook": lambda m, k, c: k.register_forward_hook(
        lambda *a: c.append(1) or 2 * a[2]
    ),
    "pre-hook": lambda m, k, c: m.register_forward_pre_hook(
        lambda *a: c.append(1) or (2 * a[1][0],)
    ),
    "backward-hook": lambda m, k, c: k.register_full_backward_hook(lambda *a: c.append(1)),
    "instance-forward": instance_forward,
    "parametrization": parametrized,
    "buffer": as_buffer,
}


@pytest.mark.parametrize("after", [0, 1], ids=["at-once", "after-a-step"])
@pytest.mark.parametrize("change", NOT_FUSED.values(), ids=NOT_FUSED)
def test_changed_modules_are_called(change, after):
    """On the clone, before its first or its second step; learn2learn calls modules always."""
    results = []
    for lib in (fastkfo, l2l):
        called = []
        clone = learner_of(lib, "mlp", "kron-psd").clone()
        for step in range(3):
            if step == after:
                module = clone.compute_update.transforms_modules[0]
                change(module, module.transform, called)
            clone.adapt(support_loss(clone, "mlp"))
        loss = query_loss(clone, "mlp")
        if change is not parametrized or not after:  # that one edits a saved tensor in place
            loss.backward()
        assert called
        results.append([loss, *clone.module.parameters()])
    for a, b in zip(*results, strict=True):
        assert_close(a, b)


def test_global_hooks_see_every_transform():
    learner = learner_of(fastkfo, "mlp", "kron-psd")
    clone, seen = learner.clone(), []
    clone.adapt(support_loss(clone, "mlp"))
    handle = register_module_forward_hook(lambda m, i, o: seen.append(type(m)))
    try:
        clone.adapt(support_loss(clone, "mlp"))
    finally:
        handle.remove()
    assert seen.count(KroneckerLinear) == 4
    assert seen.count(ReshapedTransform) == 4


@pytest.mark.parametrize("outer", [ReshapedTransform, Reshaped], ids=["plain", "reshaped"])
@pytest.mark.parametrize("inner", [KroneckerLinear, Doubled], ids=["plain", "doubled"])
def test_subclasses_are_called(outer, inner):
    def maker(param):
        n, m = (len(param), param.numel() // len(param))
        return outer(inner(n, m, psd=True), (-1, n, m))

    learners = [
        perturb(lib.algorithms.GBML(build("mlp"), maker, lr=LR).double()) for lib in (fastkfo, l2l)
    ]
    assert_same(*(meta_iteration(learner, "mlp") for learner in learners))


@pytest.mark.parametrize("shape", ["vector", "split"])
def test_other_reshapes_of_a_kronecker_linear(shape):
    def maker(param):
        n, m = (len(param), param.numel() // len(param))
        return ReshapedTransform(KroneckerLinear(n, m), (n * m,) if shape == "vector" else (n, m))

    learners = [
        perturb(lib.algorithms.GBML(build("mlp"), maker, lr=LR).double()) for lib in (fastkfo, l2l)
    ]
    assert_same(*(meta_iteration(learner, "mlp") for learner in learners))


@pytest.mark.parametrize("shape", [None, 1], ids=["default", "one"])
def test_a_scale_of_one_number(shape):
    learners = [
        perturb(lib.algorithms.GBML(build("mlp"), lambda p, lib=lib: lib.nn.Scale(shape), lr=LR))
        .double() for lib in (fastkfo, l2l)
    ]  # fmt: skip
    assert_same(*(meta_iteration(learner, "mlp") for learner in learners))


# -------------------------------------------------------------------------- transforms that are bad


class Bad(nn.Module):
    """Returns something else than an update, from its second call on."""

    def __init__(self, value, good_calls):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.value, self.left = value, [good_calls]

    def forward(self, grad):
        self.left[0] -= 1
        return self.weight * grad if self.left[0] >= 0 else self.value(grad)


BAD = {
    "shape": (lambda g: g[:1], ValueError, r"parameter 1.* return shape \[7\], got \[1\]"),
    "broadcast": (lambda g: g[None], ValueError, r"parameter 1.* shape \[7\], got \[1, 7\]"),
    "none": (lambda g: None, TypeError, "parameter 1.* to return a tensor, got NoneType"),
    "tuple": (lambda g: (g,), TypeError, "parameter 1.* to return a tensor, got tuple"),
}


@pytest.mark.parametrize("good_calls", [0, 1])
@pytest.mark.parametrize("adapt", [False, True], ids=["fixed", "adapt"])
@pytest.mark.parametrize(("value", "error", "message"), BAD.values(), ids=BAD)
def test_transforms_that_return_no_update(value, error, message, adapt, good_calls):
    kron = KroneckerTransform(KroneckerLinear)
    made = []

    def transform(param):
        if param.shape != (7,):
            return kron(param)
        made.append(Bad(value, good_calls))
        return made[0]

    clone = GBML(build("mlp"), transform, lr=LR, adapt_transform=adapt).clone()
    for _ in range(good_calls):
        clone.adapt(support_loss(clone, "mlp"))
    before = snapshot(clone)
    with pytest.raises(error, match=message):
        clone.adapt(support_loss(clone, "mlp"))
    assert snapshot(clone)[:2] == before[:2]
    made[0].left[0] = 9
    clone.adapt(support_loss(clone, "mlp"))
    query_loss(clone, "mlp").backward()


def moved(update, **to):
    for module in update.modules():
        for key, param in module._parameters.items():
            module._parameters[key] = None if param is None else param.detach().to(**to)


@pytest.mark.parametrize("adapted", [0, 1], ids=["at-once", "after-a-step"])
@pytest.mark.parametrize("lib", [fastkfo, l2l], ids=["ours", "theirs"])
@pytest.mark.parametrize("transform", ["kron-psd-bias", "kron", "curvature", "scale"])
@pytest.mark.parametrize(
    ("to", "error", "message"),
    [
        ({"dtype": torch.float32}, TypeError, r"expected torch\.float64.* got torch\.float32"),
        ({"device": "meta"}, ValueError, "for parameter 0: expected device cpu, got meta"),
    ],
    ids=["dtype", "device"],
)
def test_transforms_of_another_dtype_or_device(to, error, message, transform, lib, adapted):
    model = build("mlp")
    learner = GBML(model, TRANSFORMS[transform](lib, model), lr=LR).double()
    clone = learner.clone()
    for _ in range(adapted):
        clone.adapt(support_loss(clone, "mlp"))
    moved(clone.compute_update, **to)
    before = snapshot(clone)
    if transform == "scale" and error is TypeError:  # it multiplies, in learn2learn too
        clone.adapt(support_loss(clone, "mlp"))
        return
    with pytest.raises(error, match=message):
        clone.adapt(support_loss(clone, "mlp"))
    assert snapshot(clone)[:2] == before[:2]
    clone.compute_update = learner.compute_update
    clone.adapt(support_loss(clone, "mlp"))


def test_scale_shapes_that_do_not_fit():
    clone = GBML(build("mlp"), lambda p: Scale((2, *p.shape)).double(), lr=LR).clone()
    before = snapshot(clone)
    with pytest.raises(ValueError, match=r"parameter 0.* shape \[7, 4\], got \[2, 7, 4\]"):
        clone.adapt(support_loss(clone, "mlp"))
    assert snapshot(clone)[:2] == before[:2]
