"""`functional.inner_loop`: the kernels against the formula, in value and every derivative."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkfo.functional import inner_loop
from tests.cases import needs_native
from tests.inner_loop_cases import MODELS, TRANSFORMS, case

pytestmark = needs_native


def gradients(c, cotangents, implementation, **options):
    """The outputs, and the gradients of everything."""
    found = c(implementation=implementation, **options)
    total = (found.loss * cotangents).sum()
    return found, torch.autograd.grad(total, c.leaves(), allow_unused=True, materialize_grads=True)


def compare(c, cotangents, tolerance=1e-10, **options):
    """The kernels' results are the formula's."""
    mine, my_grads = gradients(c, cotangents, "native", **options)
    want, grads = gradients(c, cotangents, "reference", **options)
    with torch.no_grad():  # keeps nothing, and so lies elsewhere in memory
        kept_none = c(implementation="native", **options)
    for name in ("loss", "predictions", "support_loss", "statistics"):
        a, b = getattr(kept_none, name), getattr(want, name)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)
    for name, x, y in zip(mine._fields, mine, want, strict=True):
        for a, b in zip(x, y, strict=True) if isinstance(x, list) else [(x, y)]:
            assert a.shape == b.shape, name
            assert a.dtype == b.dtype, name
            if a.dtype.is_floating_point:
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)
    scale = max([float(g.abs().max()) for g in grads])
    for x, a, b in zip(c.leaves(), my_grads, grads, strict=True):
        assert a.shape == x.shape
        error = float((a - b).norm())
        assert error <= tolerance * (float(b.norm()) + 1e-3 * scale), (x.shape, error)


def weights(tasks, equal=False):
    """Cotangents of the losses."""
    return torch.full((tasks,), 0.7).double() if equal else torch.arange(tasks).double() - 0.5


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("model", MODELS)
def test_value_and_gradient(model, transform, steps):
    compare(case(model, transform, steps=steps), weights(3, equal=steps == 3))


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("transform", ["none", "psd", "factors", "left", "right"])
@pytest.mark.parametrize("model", MODELS)
def test_adapted_transforms(model, transform, steps):
    c = case(model, transform, steps=steps, adapt_transform=True)
    compare(c, weights(3, equal=steps == 5))


@pytest.mark.parametrize("transform", ["psd", "factors", "left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {"own": True},
        {"tasks": 33, "samples": 3},
        {"samples": 40, "queries": 2},
        {"first_order": True},
        {"bias": False},
        {"loss": "mse", "reduction": "sum"},
    ],
    ids=str,
)
def test_options_of_adapted_transforms(transform, options):
    c = case("two layers", transform, **({"steps": 3} | options), adapt_transform=True)
    compare(c, weights(c.data[0].shape[0]))
    compare(c, weights(c.data[0].shape[0], equal=True))


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("form", ["dense", "factored", "gram"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("model", ["head", "one number", "two layers", "smooth", "batch norm"])
def test_forms(model, transform, form, steps):
    compare(case(model, transform, steps=steps, form=form), weights(3, equal=steps == 3))


@pytest.mark.parametrize("form", ["dense", "factored", "gram"])
@pytest.mark.parametrize("transform", ["psd", "factors", "left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {"own": True},
        {"tasks": 33, "samples": 3},
        {"samples": 40, "queries": 2},
        {"samples": 2, "queries": 19},
        {"first_order": True},
        {"bias": False},
        {"loss": "mse", "steps": 10},
    ],
    ids=str,
)
def test_options_of_forms(transform, form, options):
    c = case("two layers", transform, **({"steps": 2} | options), form=form)
    compare(c, weights(c.data[0].shape[0]))
    compare(c, weights(c.data[0].shape[0], equal=True))


@pytest.mark.parametrize("transform", ["none", "psd", "all"])
@pytest.mark.parametrize("model", ["head", "two layers", "norm first"])
@pytest.mark.parametrize(
    "options",
    [
        {"loss": "mse"},
        {"loss": "mse", "reduction": "sum"},
        {"reduction": "sum"},
        {"first_order": True},
        {"bias": False},
        {"own": True},
        {"tasks": 1},
        {"tasks": 1, "own": True},
        {"tasks": 33, "samples": 3},
        {"samples": 40, "queries": 2},
        {"steps": 10},
        {"query_reduction": "sum"},
    ],
    ids=str,
)
def test_options(model, transform, options):
    c = case(model, transform, **options)
    compare(c, weights(c.data[0].shape[0]))


@pytest.mark.parametrize("model", ["head", "sine", "norm first"])
def test_adapted_parameters_are_differentiable(model):
    found = {}
    for implementation in ("native", "reference"):
        c = case(model, "psd")
        out = c(implementation=implementation, adapted=True)
        through = [(x * torch.cos(torch.arange(x.numel()).view_as(x))).sum() for x in out.theta]
        total = sum(through) + (out.loss * weights(3)).sum()
        found[implementation] = [*out.theta, *torch.autograd.grad(total, c.leaves())]
    for a, b in zip(found["native"], found["reference"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("steps", [0, 2])
def test_adapted_parameters_without_a_query(steps):
    found = {}
    for implementation in ("native", "reference"):
        c = case("two layers", "psd", steps=steps)
        c.data[2:] = []
        out = c(implementation=implementation, adapted=True)
        assert out.loss is None
        assert out.predictions is None
        leaves = [*c.theta, c.data[0]]
        grads = torch.autograd.grad(
            sum([x.square().sum() for x in out.theta]), leaves, allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        found[implementation] = [*out.theta, *grads]
    for a, b in zip(found["native"], found["reference"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_query_inputs_without_targets_have_no_gradient():
    c = case("head", steps=2)
    c.data[3] = None
    for implementation in ("native", "reference"):
        torch.full((3, 5, 7), 7.0).double()  # memory that might be handed out again
        out = c(implementation=implementation, adapted=True)
        total = sum([x.sum() for x in out.theta])
        (grad,) = torch.autograd.grad(total, c.data[2], allow_unused=True, materialize_grads=True)
        assert grad.eq(0).all()


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_a_tensor_that_is_given_twice(implementation):
    c = case("no activation", "none", bias=False)
    shared = torch.eye(3, dtype=torch.float64).mul(1.3).requires_grad_()
    c.groups["left"][0] = c.groups["right"][1] = shared
    x = c.data[0]
    c.data[2:] = [x, c.data[1]]
    loss = c(implementation=implementation).loss.sum()
    want = torch.autograd.grad(loss, (shared, x), retain_graph=True)
    found = torch.autograd.grad(loss, (shared, x), create_graph=True)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.detach(), b)


def test_predictions_without_targets():
    c = case("head")
    c.data[3] = None
    mine, want = (c(implementation=x) for x in ("native", "reference"))
    assert mine.loss is None
    torch.testing.assert_close(mine.predictions, want.predictions)


@pytest.mark.parametrize(
    ("transform", "adapt"),
    [("none", False), ("psd", False), ("scale", False), ("psd", True), ("factors", True)],
)
def test_gradcheck(transform, adapt):
    c = case("two layers", transform, tasks=2, samples=2, queries=2, adapt_transform=adapt)
    leaves = c.leaves()
    count, names = len(c.theta), list(c.groups)

    def losses(*flat):
        values = iter(flat[count:-2])
        groups = {
            name: [None if x is None else next(values) for x in c.groups[name]] for name in names
        }
        data = [flat[-2], c.data[1], flat[-1], c.data[3]]
        return inner_loop(c.layers, flat[:count], *data, **groups, **c.options).loss

    assert torch.autograd.gradcheck(losses, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(losses, leaves, fast_mode=True)


def test_a_second_backward_pass_gives_the_same():
    c = case("sine", loss="mse")
    out = c()
    first = torch.autograd.grad(out.loss.sum(), c.leaves(), retain_graph=True)
    again = torch.autograd.grad(out.loss.sum(), c.leaves(), retain_graph=True)
    twice = torch.autograd.grad(2 * out.loss.sum(), c.leaves(), retain_graph=True)
    own = torch.autograd.grad((out.loss * weights(3)).sum(), c.leaves())
    want = gradients(c, weights(3), "reference")[1]
    for a, b, d, e, f in zip(first, again, twice, own, want, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(d, 2 * a)
        torch.testing.assert_close(e, f, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bitwise_the_same_for_any_number_of_threads(threads):
    c = case("sine", loss="mse", tasks=9, samples=20, steps=5, dtype=torch.float32, lr=0.01)
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, threads):
            torch.set_num_threads(count)
            out = c()
            found.append([out.loss, *torch.autograd.grad(out.loss.sum(), c.leaves())])
    finally:
        torch.set_num_threads(before)
    assert all([torch.equal(a, b) for a, b in zip(*found, strict=True)])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("transform", ["none", "psd", "all"])
def test_float32_is_as_near_as_the_formula(model, transform):
    exact = gradients(case(model, transform, steps=3), weights(3), "reference")[1]
    errors = {}
    for implementation in ("native", "reference"):
        c = case(model, transform, steps=3, dtype=torch.float32)
        found = gradients(c, weights(3).float(), implementation)[1]
        errors[implementation] = [
            float((a.double() - b).norm()) for a, b in zip(found, exact, strict=True)
        ]
    largest = max([float(b.norm()) for b in exact])
    longest = max([max(x.shape) for x in case(model).leaves()])
    floor = 8 * torch.finfo(torch.float32).eps * longest**0.5
    for mine, plain, b in zip(errors["native"], errors["reference"], exact, strict=True):
        assert mine <= max(2 * plain, floor * max(float(b.norm()), 0.1 * largest))


def test_a_bad_task_stays_alone():
    good = case("two layers", "psd", tasks=4, steps=2)
    bad = case("two layers", "psd", tasks=4, steps=2)
    with torch.no_grad():
        bad.data[0][2, 1, 0] = torch.nan
    for cotangents in (torch.ones(4).double(), torch.tensor([1.0, 1.0, 0.0, 1.0]).double()):
        rest = torch.tensor([1.0, 1.0, 0.0, 1.0]).double()
        mine, my_grads = gradients(bad, cotangents, "native")
        want, grads = gradients(good, rest, "native")
        assert mine.finite.tolist() == [True, True, False, True]
        torch.testing.assert_close(mine.loss[[0, 1, 3]], want.loss[[0, 1, 3]])
        for a, b in zip(my_grads[:-2], grads[:-2], strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(my_grads[-2:], grads[-2:], strict=True):
            torch.testing.assert_close(a[[0, 1, 3]], b[[0, 1, 3]])
            if cotangents[2] == 0:
                assert a[2].eq(0).all()


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(1, 20), min_size=2, max_size=4),
    kinds=st.lists(st.sampled_from(["relu", "tanh", "gelu", "layer_norm", None]), max_size=3),
    sizes=st.tuples(*[st.integers(1, n) for n in (5, 19, 18)]),
    steps=st.integers(0, 4),
    transform=st.sampled_from(TRANSFORMS),
    seed=st.integers(0, 1000),
)
def test_any_chain(widths, kinds, sizes, steps, transform, seed):
    model = []
    for k, width in enumerate(widths[1:]):
        model.append(width)
        if k < len(kinds) and kinds[k] is not None and k < len(widths) - 2:
            model.append(kinds[k])
    MODELS["any"] = (widths[0], model)
    try:
        tasks, samples, queries = sizes
        compare(
            case("any", transform, tasks, samples, queries, steps, loss="mse", seed=seed),
            weights(tasks),
            tolerance=1e-8,
        )
    finally:
        del MODELS["any"]


@pytest.mark.parametrize("adapted", [False, True])
def test_opcheck(adapted):
    c = case("norm first", "psd", tasks=2)
    spec_groups = [[x.detach() for x in c.theta]]
    spec_groups += [[None if x is None else x.detach() for x in g] for g in c.groups.values()]
    numbers = []
    kinds = ("linear", "batch_norm", "layer_norm", "gelu")
    places = dict(zip(kinds, (0, 8, 9, 6), strict=True))
    for layer in c.layers:
        numbers += [places[layer.kind], *layer[1:5]]
    rest = (numbers, [x.constant for x in c.layers], c.options["lr"], 2, 0, 0, 7, True, False)
    data = [x.detach() for x in c.data]
    ops = torch.ops.fastkfo
    size = ops.inner_loop_tape(*spec_groups, *data, *rest)
    tape = torch.zeros(2, size, dtype=torch.float64)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        ops.inner_loop_forward.default,
        (*spec_groups, *data, tape, *rest, adapted),
        test_utils=tests,
    )
    wanted = [15] * len(c.theta)
    ops.inner_loop_forward(*spec_groups, *data, tape, *rest, adapted)
    torch.library.opcheck(
        ops.inner_loop_backward.default,
        (torch.ones(2).double(), [], *spec_groups, *data, tape, *rest, False, wanted, True, True),
        test_utils=tests,
    )
    torch.library.opcheck(
        ops.inner_loop_gradient.default,
        (*spec_groups, *data, *rest, False, wanted, True, True),
        test_utils=tests,
    )


def test_non_contiguous_operands():
    c, strided = case("two layers", "psd"), case("two layers", "psd")

    def spread(x):
        return torch.stack([x, x], -1)[..., 0].detach().requires_grad_(x.requires_grad)

    strided.theta = [spread(x) for x in c.theta]
    strided.groups = {k: [None if x is None else spread(x) for x in g] for k, g in c.groups.items()}
    strided.data = [spread(x) if x.is_floating_point() else x.t().contiguous().t() for x in c.data]
    for a, b in zip(
        gradients(c, weights(3), "native")[1],
        gradients(strided, weights(3), "native")[1],
        strict=True,
    ):
        assert torch.equal(a, b)


def test_no_graph_is_kept_under_no_grad():
    c = case("head")
    with torch.no_grad():
        out = c()
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, c().loss.detach())


def test_learned_rates():
    for shape in ((), (1,), None):
        found = {}
        for implementation in ("native", "reference"):
            c = case("two layers", "psd")
            rates = [
                torch.full(x.shape if shape is None else shape, 0.1, dtype=torch.float64)
                for x in c.theta
            ]
            rates = [r.requires_grad_() for r in rates]
            out = c(implementation=implementation, lr=rates)
            found[implementation] = torch.autograd.grad(out.loss.sum(), rates)
        for a, b in zip(found["native"], found["reference"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
