"""GBML equals learn2learn's: losses, adapted parameters and meta-gradients, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from tests.cases import every_fifth
from tests.models import (
    LR,
    STEPS,
    TRANSFORMS,
    PlainKron,
    assert_close,
    assert_same,
    build,
    collect,
    learner_of,
    meta_iteration,
    perturb,
    query_loss,
    snapshot,
    support_loss,
    task,
)
from tests.oracle import learn2learn

l2l = learn2learn()


OPTIONS = {
    "second": {},
    "first": {"first_order": True},
    "second-adapt": {"adapt_transform": True},
    "first-adapt": {"first_order": True, "adapt_transform": True},
}


def first_order_with_adapted_transform(learner, name, lr=LR):
    """What learn2learn crashes on: g_k is a constant, φ's updates are differentiable in φ.

    φ_k = φ_{k-1} + α² (∂U_{φ_{k-1}}(g_{k-1})/∂φ)ᵀ g_k. Written with learn2learn's `utils` alone;
    only the modules of the learner are used.
    """

    def run_task(t):
        model = l2l.clone_module(learner.module)
        update = l2l.clone_module(learner.compute_update)
        transformed = []
        for step in range(STEPS):
            loss = support_loss(model, name, t)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            if step > 0:
                phi = list(update.parameters())
                last = [(u, g) for u, g in zip(transformed, grads, strict=True) if u.requires_grad]
                outputs, cotangents = zip(*last, strict=True)
                deltas = torch.autograd.grad(
                    outputs, phi, cotangents, create_graph=True, allow_unused=True
                )
                l2l.update_module(update, [None if d is None else lr**2 * d for d in deltas])
            modules = list(update.transforms_modules)
            transformed = [
                g if i is None else modules[i](g)
                for i, g in zip(update.transforms_indices, grads, strict=True)
            ]
            l2l.update_module(model, [-lr * u for u in transformed])
        return query_loss(model, name, t), [*model.parameters(), *update.parameters()]

    return collect(learner, run_task)


def oracle(name, transform, **options):
    learner = learner_of(l2l, name, transform, **options)
    if options.get("first_order") and options.get("adapt_transform"):
        return first_order_with_adapted_transform(learner, name)
    return meta_iteration(learner, name)


@pytest.mark.parametrize(
    ("name", "transform", "option"),
    every_fifth(["mlp", "cnn", "tied", "lstm"], TRANSFORMS, OPTIONS),
)
def test_equals_learn2learn(name, transform, option):
    options = OPTIONS[option]
    learner = learner_of(fastkfo, name, transform, **options)
    if transform == "none":  # with nothing to adapt, learn2learn's adapt_transform crashes
        options = {**options, "adapt_transform": False}
    assert_same(meta_iteration(learner, name), oracle(name, transform, **options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("transform", ["kron-psd-bias", "mixture"])
def test_equals_learn2learn_on_a_gru(transform, options):
    learner = learner_of(fastkfo, "gru", transform, **options)
    assert_same(meta_iteration(learner, "gru"), oracle("gru", transform, **options))


ALLOW = {
    "unused": {"allow_unused": True},
    "frozen": {"allow_nograd": True, "allow_unused": True},
}


@pytest.mark.parametrize(
    ("name", "transform", "option", "where"),
    every_fifth(
        ALLOW,
        ["kron-psd-bias", "curvature", "module", "dictionary"],
        list(OPTIONS)[:3],
        ["init", "clone", "adapt"],
    ),
)
def test_unused_and_frozen(name, transform, option, where):
    allow, options = ALLOW[name], OPTIONS[option]

    def run(lib):
        init = {**options, **(allow if where == "init" else {})}
        learner = learner_of(lib, name, transform, **init)
        calls = {where: allow} if where != "init" else {}
        return meta_iteration(learner, name, **calls)

    assert_same(run(fastkfo), run(l2l))


@pytest.mark.parametrize("options", list(OPTIONS.values())[:2], ids=list(OPTIONS)[:2])
def test_frozen_without_adapting_the_transform_needs_allow_nograd_alone(options):
    runs = []
    for lib in (fastkfo, l2l):
        learner = learner_of(lib, "frozen", "kron-psd", allow_nograd=True, **options)
        runs.append(meta_iteration(learner, "frozen"))
    assert_same(*runs)


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
def test_any_number_of_steps(steps):
    runs = []
    for lib in (fastkfo, l2l):
        learner = learner_of(lib, "mlp", "kron-psd-bias", adapt_transform=True)
        runs.append(meta_iteration(learner, "mlp", steps=steps))
    if steps == 0:  # the transform takes no part
        for run in runs:
            assert all(g is None for n, g in run.grads.items() if n.startswith("compute_update"))
    assert_same(*runs)


@pytest.mark.parametrize("given", ["clone", "adapt"])
@pytest.mark.parametrize("first_order", [True, False], ids=["first", "second"])
def test_options_of_a_call_override_the_learner_s(given, first_order):
    runs = []
    for lib in (fastkfo, l2l):
        learner = learner_of(lib, "mlp", "kron-psd", first_order=not first_order)
        runs.append(meta_iteration(learner, "mlp", **{given: {"first_order": first_order}}))
    assert_same(*runs)
    same = meta_iteration(learner_of(l2l, "mlp", "kron-psd", first_order=first_order), "mlp")
    assert_same(runs[0], same)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("transform", ["kron-psd-bias", "curvature", "module", "scale"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_learn2learn_s_transforms_in_our_gbml(name, transform, options):
    learner = learner_of(fastkfo, name, transform, olib=l2l, **options)
    assert_same(meta_iteration(learner, name), oracle(name, transform, **options))


@pytest.mark.parametrize("options", list(OPTIONS.values())[:3], ids=list(OPTIONS)[:3])
@pytest.mark.parametrize("transform", ["kron-psd-bias", "curvature", "module", "dictionary"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_our_transforms_in_learn2learn_s_gbml(name, transform, options):
    learner = learner_of(l2l, name, transform, olib=fastkfo, **options)
    assert_same(meta_iteration(learner, name), oracle(name, transform, **options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compute_update_of_the_other_library(options):
    model = build("mlp")
    update = l2l.optim.ParameterUpdate(model.parameters(), TRANSFORMS["kron-psd"](l2l, model))
    learner = fastkfo.algorithms.GBML(model, None, lr=LR, compute_update=update, **options)
    got = meta_iteration(perturb(learner.double()), "mlp")
    assert_same(got, oracle("mlp", "kron-psd", **options))


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_bit_exact_at_the_identity(name, dtype):
    model = build(name).to(dtype)
    transform = fastkfo.optim.KroneckerTransform(fastkfo.nn.KroneckerLinear, bias=True)
    learner = fastkfo.algorithms.GBML(model, transform, lr=LR).to(dtype)
    clone = learner.clone()
    x, y, _, _ = task(name)
    out = clone(x.to(dtype))
    assert torch.equal(out, model(x.to(dtype)))
    params = list(clone.module.parameters())
    grads = torch.autograd.grad(F.cross_entropy(out, y), params)
    updates = clone.compute_update(F.cross_entropy(clone(x.to(dtype)), y), params)
    assert all(torch.equal(u, g) for u, g in zip(updates, grads, strict=True))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("which", ["root", "clone"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_state_dicts_load_both_ways(name, which, transform):
    ours, theirs = (
        lib.algorithms.GBML(m := build(name), TRANSFORMS[transform](lib, m), lr=LR).double()
        for lib in (fastkfo, l2l)
    )
    for source, target in ((ours, theirs), (theirs, ours)):
        perturb(source)
        saved = source.clone() if which == "clone" else source
        assert list(saved.state_dict()) == list(target.state_dict())
        target.load_state_dict(saved.state_dict(), strict=True)
        pairs = zip(source.named_parameters(), target.named_parameters(), strict=True)
        assert all(n == m and torch.equal(p, q) for (n, p), (m, q) in pairs)


# ------------------------------------------------------------------------------- beyond learn2learn


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("psd", "bias"), [(True, True), (False, False)], ids=["psd-bias", "raw"])
@pytest.mark.parametrize("name", ["conv1d", "conv3d", "scalar"])
def test_parameters_of_any_rank(name, psd, bias, options):
    model = build(name)
    transform = fastkfo.optim.KroneckerTransform(fastkfo.nn.KroneckerLinear, bias=bias, psd=psd)
    learner = perturb(fastkfo.algorithms.GBML(model, transform, lr=LR, **options))
    assert all(p.dtype == torch.float64 for p in learner.parameters())  # with no .double() here
    other = perturb(
        l2l.algorithms.GBML(build(name), lambda p: PlainKron(p, bias, psd), lr=LR, **options)
    )
    both = options.get("first_order") and options.get("adapt_transform")
    run = first_order_with_adapted_transform if both else meta_iteration
    assert_same(meta_iteration(learner, name), run(other, name))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("transform", ["kron-psd-bias", "curvature", "module", "scale"])
def test_channels_last(transform, options):
    learner = learner_of(fastkfo, "cnn", transform, **options)
    learner.module.to(memory_format=torch.channels_last)

    def run_task(t):
        x_s, y_s, x_q, y_q = task("cnn", t)
        x_s, x_q = (x.to(memory_format=torch.channels_last) for x in (x_s, x_q))
        clone = learner.clone()
        for _ in range(STEPS):
            clone.adapt(F.cross_entropy(clone(x_s), y_s))
        return F.cross_entropy(clone(x_q), y_q), list(clone.parameters())

    assert_same(collect(learner, run_task), oracle("cnn", transform, **options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_kronecker_network_as_transform(options):
    runs = []
    for lib in (fastkfo, l2l):
        model = build("mlp")
        transform = fastkfo.optim.KroneckerTransform(fastkfo.nn.KroneckerNetwork)
        learner = perturb(lib.algorithms.GBML(model, transform, lr=LR, **options), 0.02)
        both = options.get("first_order") and options.get("adapt_transform")
        crashes = lib is l2l and both
        run = first_order_with_adapted_transform if crashes else meta_iteration
        runs.append(run(learner, "mlp"))
    assert_same(*runs)


@pytest.mark.parametrize("kind", ["tensor", "parameter"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_learned_rate(kind, options):
    def learner_with(value, lib=fastkfo):
        rate = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        rate = nn.Parameter(rate.detach()) if kind == "parameter" else rate
        model = build("mlp")
        transform = TRANSFORMS["kron-psd"](lib, model)
        learner = lib.algorithms.GBML(model, transform, lr=rate, **options).double()
        perturb(learner.module)
        return learner, perturb(learner.compute_update)

    learner, _ = learner_with(LR)
    got = meta_iteration(learner, "mlp")
    keys = [k for k in learner.state_dict() if k.endswith("lr")]
    assert keys == (["lr", "diff_sgd.lr"] if kind == "parameter" else [])
    assert learner.lr.grad is not None
    if not options.get("first_order"):  # a gradient of first order is no derivative
        other, _ = learner_with(LR, l2l)
        assert_same(got, meta_iteration(other, "mlp"))
        assert_close(learner.lr.grad, other.lr.grad)
        eps = 1e-5
        up, down = (sum(meta_iteration(learner_with(LR + e)[0], "mlp").losses) for e in (eps, -eps))
        assert_close(learner.lr.grad, (up - down) / (2 * eps), tol=1e-6)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("how", ["function", "method", "inside"])
def test_compiled_models(how):
    model = build("mlp")
    if how == "method":
        model.compile()
    elif how == "inside":
        model[0].compile()
    else:
        model = torch.compile(model)
    with pytest.raises(
        TypeError, match="module: expected a module of plain PyTorch, got a compiled"
    ):
        fastkfo.algorithms.GBML(model, lambda p: None)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": float("nan")}, ValueError, "lr: expected a finite number, got nan"),
        ({"lr": "1"}, TypeError, "lr: expected a number, a tensor or a PerStepLR, got str"),
        ({"module": 3}, TypeError, r"module: expected a torch\.nn\.Module, got int"),
        ({"adapt_update": True}, TypeError, "unexpected keyword arguments .'adapt_update'"),
    ],
    ids=["nan", "str", "module", "keyword"],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        fastkfo.algorithms.GBML(**{"module": build("mlp"), "transform": lambda p: None, **options})


def test_integer_parameters():
    model = build("mlp")
    model.register_parameter("count", nn.Parameter(torch.tensor([3]), requires_grad=False))
    for transform in ("kron", "curvature", "module"):
        with pytest.raises(TypeError, match=r"param: expected .*floating.* got torch\.int64"):
            fastkfo.algorithms.GBML(model, TRANSFORMS[transform](fastkfo, model))


BAD_LOSSES = {
    "number": (lambda m: 0.5, TypeError, "loss: expected a tensor, got float"),
    "vector": (lambda m: m(task("frozen")[0])[0], ValueError, r"loss: expected one number.*\[3\]"),
    "detached": (lambda m: m(task("frozen")[0]).sum().detach(), ValueError, "with a graph"),
    "frozen": (lambda m: support_loss(m, "frozen"), RuntimeError, "allow_nograd=True"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("bad", "error", "message"), BAD_LOSSES.values(), ids=BAD_LOSSES)
@pytest.mark.parametrize("transform", ["kron-psd", "user"])
def test_bad_losses_leave_the_learner_alone(transform, bad, error, message, options):
    clone = learner_of(fastkfo, "frozen", transform, **options).clone()
    good = {"allow_nograd": True, "allow_unused": True}
    for _ in range(2):  # the second time with a transform that is adapted
        before = snapshot(clone)
        with pytest.raises(error, match=message):
            clone.adapt(bad(clone))
        assert snapshot(clone)[:2] == before[:2]
        clone.adapt(support_loss(clone, "frozen"), **good)
        assert snapshot(clone)[0] != before[0]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_unused_parameter_without_the_option(options):
    clone = learner_of(fastkfo, "unused", "kron-psd", **options).clone()
    for _ in range(2):
        before = snapshot(clone)
        with pytest.raises(RuntimeError, match="allow_unused=True"):
            clone.adapt(support_loss(clone, "unused"))
        assert snapshot(clone)[:2] == before[:2]
        clone.adapt(support_loss(clone, "unused"), allow_unused=True)
