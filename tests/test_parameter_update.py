"""ParameterUpdate and DifferentiableSGD, and the loop of Meta-KFO's own scripts, in float64."""

import pytest
import torch
from torch import nn

import fastkfo
from fastkfo.algorithms import GBML
from fastkfo.optim import (
    DifferentiableSGD,
    KroneckerTransform,
    LearnableOptimizer,
    ParameterUpdate,
)
from tests.models import (
    LR,
    STEPS,
    TRANSFORMS,
    assert_close,
    assert_same,
    build,
    collect,
    perturb,
    query_loss,
    snapshot,
    support_loss,
    task,
)
from tests.oracle import learn2learn

l2l = learn2learn()


def script(lib, name, transform, olib=None, adapt_transform=True, **allow):
    """One meta-iteration as the KFO scripts write it."""
    model = build(name)
    update = lib.optim.ParameterUpdate(
        model.parameters(), TRANSFORMS[transform](olib or lib, model)
    )
    sgd = lib.optim.DifferentiableSGD(lr=LR)
    root = perturb(nn.ModuleList([model, update]).double())

    def run_task(t):
        learner, task_update = lib.clone_module(model), lib.clone_module(update)
        for step in range(STEPS):
            error = support_loss(learner, name, t)
            if adapt_transform and step > 0:
                grads = torch.autograd.grad(
                    error,
                    list(task_update.parameters()),
                    create_graph=True,
                    retain_graph=True,
                    allow_unused=bool(allow),
                )
                sgd(task_update, grads)
            updates = task_update(
                error, learner.parameters(), create_graph=True, retain_graph=True, **allow
            )
            sgd(learner, updates)
        return query_loss(learner, name, t), [*learner.parameters(), *task_update.parameters()]

    return collect(root, run_task)


@pytest.mark.parametrize("adapt", [True, False], ids=["adapt", "fixed"])
@pytest.mark.parametrize("transform", [k for k in TRANSFORMS if k != "none"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "tied"])
def test_scripts_of_meta_kfo(name, transform, adapt):
    assert_same(
        script(fastkfo, name, transform, adapt_transform=adapt),
        script(l2l, name, transform, adapt_transform=adapt),
    )


@pytest.mark.parametrize("transform", ["kron-psd-bias", "curvature", "dictionary", "user"])
@pytest.mark.parametrize(
    ("name", "allow"),
    [
        ("unused", {"allow_unused": True}),
        ("frozen", {"allow_nograd": True, "allow_unused": True}),
    ],
    ids=["unused", "frozen"],
)
def test_scripts_with_unused_and_frozen_parameters(name, allow, transform):
    runs = [script(lib, name, transform, **allow) for lib in (fastkfo, l2l)]
    assert_same(*runs)


@pytest.mark.parametrize("transform", ["kron-psd-bias", "curvature", "module"])
@pytest.mark.parametrize(
    "libs", [(fastkfo, l2l), (l2l, fastkfo)], ids=["theirs-in-ours", "ours-in-theirs"]
)
def test_scripts_that_mix_libraries(libs, transform):
    assert_same(script(libs[0], "cnn", transform, libs[1]), script(l2l, "cnn", transform))


def test_equals_gbml_with_adapt_transform():
    gbml = perturb(
        GBML(m := build("cnn"), TRANSFORMS["kron-psd"](fastkfo, m), lr=LR, adapt_transform=True)
    )

    def run_task(t):
        clone = gbml.clone()
        for _ in range(STEPS):
            clone.adapt(support_loss(clone, "cnn", t))
        return query_loss(clone, "cnn", t), list(clone.parameters())

    assert_same(collect(gbml, run_task), script(fastkfo, "cnn", "kron-psd"))


def updater(name="mlp", transform="kron-psd-bias"):
    model = build(name)
    update = ParameterUpdate(model.parameters(), TRANSFORMS[transform](fastkfo, model)).double()
    return model, perturb(update)


def test_none_updates_stay_none():
    model, update = updater("frozen")
    made = update(support_loss(model, "frozen"), model.parameters(), allow_nograd=True)
    assert [u is None for u in made] == [not p.requires_grad for p in model.parameters()]
    model, update = updater("unused")
    made = update(support_loss(model, "unused"), model.parameters(), allow_unused=True)
    assert [u is None for u in made] == [False, False, True, True, False, False]


def test_keys_count_parameters_with_a_transform():
    model = build("mlp")
    chosen = {id(model[0].bias), id(model[2].weight)}
    kron = KroneckerTransform(fastkfo.nn.KroneckerLinear)
    update = ParameterUpdate(model.parameters(), lambda p: kron(p) if id(p) in chosen else None)
    assert update.transforms_indices == [None, 0, 1, None]
    assert list(update.state_dict()) == [
        f"transforms_modules.{i}.transform.{factor}" for i in (0, 1) for factor in ("left", "right")
    ]


@pytest.mark.parametrize("allow_nograd", [False, True], ids=["plain", "nograd"])
def test_the_graph_is_kept_if_asked_for(allow_nograd):
    model, update = updater()
    params = list(model.parameters())
    loss = support_loss(model, "mlp")
    # learn2learn ignores retain_graph where allow_nograd is set.
    first = update(loss, params, retain_graph=True, allow_nograd=allow_nograd)
    second = update(loss, params, allow_nograd=allow_nograd)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        update(loss, params)


def test_parameters_may_be_an_iterator_over_any_iterable():
    model, update = updater()
    a = update(support_loss(model, "mlp"), (p for p in model.parameters()))
    b = update(support_loss(model, "mlp"), tuple(model.parameters()))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------------------------- bad input


BAD_CALLS = {
    "short": (lambda m: (support_loss(m, "mlp"), list(m.parameters())[:3]),
              ValueError, "parameters: expected 4, one per transform, got 3"),
    "long": (lambda m: (support_loss(m, "mlp"), [*m.parameters(), m[0].weight]),
             ValueError, "parameters: expected 4, one per transform, got 5"),
    "number": (lambda m: (1.0, m.parameters()), TypeError, "loss: expected a tensor, got float"),
    "vector": (lambda m: (m(task("mlp")[0]), m.parameters()),
               ValueError, "loss: expected one number"),
    "no-graph": (lambda m: (support_loss(m, "mlp").detach(), m.parameters()),
                 ValueError, "loss: expected a tensor with a graph"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(call, error, message):
    model, update = updater()
    before = snapshot(update), snapshot(model)
    with pytest.raises(error, match=message):
        update(*call(model))
    assert [s[:2] for s in before] == [s[:2] for s in (snapshot(update), snapshot(model))]
    assert len(update(support_loss(model, "mlp"), model.parameters())) == 4


@pytest.mark.parametrize(
    ("name", "hint"), [("unused", "allow_unused=True"), ("frozen", "allow_nograd=True")]
)
def test_unused_and_frozen_parameters_without_the_option(name, hint, capsys):
    model, update = updater(name)
    with pytest.raises(RuntimeError, match=hint):  # an unbound local in learn2learn
        update(support_loss(model, name), model.parameters())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "made", [3, "linear", nn.Linear, lambda g: g], ids=["int", "str", "class", "function"]
)
@pytest.mark.parametrize(
    "use", [ParameterUpdate, LearnableOptimizer, GBML], ids=["update", "optimizer", "gbml"]
)
def test_a_transform_that_makes_no_module(use, made):
    model = build("mlp")
    given = model.parameters() if use is ParameterUpdate else model
    with pytest.raises(ValueError, match="transform: expected a Module or None for parameter 0"):
        use(given, lambda p: made)


@pytest.mark.parametrize(
    "lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["number", "tensor"]
)
def test_differentiable_sgd(lr):
    results = []
    for lib in (fastkfo, l2l):
        model = lib.clone_module(build("cnn"))
        params = list(model.parameters())
        grads = list(torch.autograd.grad(support_loss(model, "cnn"), params))
        grads[2] = None
        assert lib.optim.update_rules.DifferentiableSGD(lr)(model, grads) is None
        results.append(list(model.parameters()))
        assert results[-1][2] is params[2]
    for a, b in zip(*results, strict=True):
        assert_close(a, b, floor=1e-3)


def test_differentiable_sgd_reads_the_parameters_own_gradients():
    model = build("mlp")
    support_loss(model, "mlp").backward()
    want = [p - LR * p.grad for p in model.parameters()]
    DifferentiableSGD(LR)(model)
    for a, b in zip(model.parameters(), want, strict=True):
        assert_close(a, b, tol=1e-14)


def test_a_rate_that_is_a_parameter_is_registered():
    assert list(DifferentiableSGD(nn.Parameter(torch.tensor(0.1))).state_dict()) == ["lr"]
    assert list(DifferentiableSGD(torch.tensor(0.1)).state_dict()) == []
