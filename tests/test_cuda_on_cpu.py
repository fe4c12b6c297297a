"""The CUDA code of the fused inner loop, its blocks emulated on a CPU, against the CPU kernels.

tests/cuda_on_cpu has the emulation. It says nothing about speed or about memory that is not a
block's own; tests/test_inner_loop_fused_gpu.py runs the same cases on a GPU.
"""

import re
import shutil

import pytest
import torch

from fastkfo.functional.inner_loop_spec import FORMS, Spec, flattened
from fastkfo.reference.inner_loop import LOSSES
from tests import emulation
from tests.cases import needs_native
from tests.inner_loop_cases import MODELS, TRANSFORMS, case

OPS = tuple(f"inner_loop_{x}" for x in ("forward", "tape", "gradient", "backward"))

pytestmark = [
    needs_native,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ on Linux"),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The ops, built from csrc/cuda."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    with emulation.emulated("inner_loop.cpp", "cuda_on_cpu", OPS, folder) as ops:
        yield ops


def arguments(c, **changes):
    """The operands of a case, and the arguments that are no tensors."""
    groups = [c.theta, *c.groups.values()]
    groups = [[None if x is None else x.detach() for x in group] for group in groups]
    present, _ = flattened(groups)
    options = c.options | changes
    loss = LOSSES.index(f"{options['loss']}_{options['reduction']}")
    spec = Spec(
        c.layers, present, options["lr"], options["steps"], (loss, loss), options["psd"],
        options.get("first_order", False), False, native=True, form=options.get("form", "auto"),
        adapt=options.get("adapt_transform", False),
    )  # fmt: skip
    data = [None if x is None else x.detach() for x in c.data]
    return (*groups, *data), spec


def compare(mine, want, tolerance=1e-11):
    assert len(mine) == len(want)
    for k, (a, b) in enumerate(zip(mine, want, strict=True)):
        assert a.shape == b.shape, k
        if a.dtype == torch.bool:
            assert torch.equal(a, b), k
        else:
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance, msg=lambda m, k=k: f"{k}: {m}"
            )


def check(ours, c, cotangents=None, adapted=None):
    """Both libraries' results for one case: all at once, and with a tape."""
    operands, spec = arguments(c)
    masks = [
        sum([1 << bit for bit, x in enumerate(own) if x is not None])
        for own in zip(*operands[:5], strict=True)
    ]
    theirs = torch.ops.fastkfo
    found = []
    for ops in (ours, theirs):
        at_once = ops.inner_loop_gradient(
            *operands, *spec.arguments, spec.first_order, masks, True, True
        )
        tasks = len(operands[5])
        size = ops.inner_loop_tape(*operands, *spec.arguments)
        tape = torch.full((tasks, size), torch.nan, dtype=operands[5].dtype)
        out = ops.inner_loop_forward(*operands, tape, *spec.arguments, adapted is not None)
        weights = torch.arange(tasks, dtype=tape.dtype) - 0.5 if cotangents is None else cotangents
        back = ops.inner_loop_backward(
            weights, [] if adapted is None else adapted(out[5:]), *operands, tape, *spec.arguments,
            spec.first_order, masks, True, True,
        )  # fmt: skip
        plain = ops.inner_loop_forward(*operands, None, *spec.arguments, False)
        found.append([*at_once, *out, *back, *plain])
    compare(*found)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model(emulated, model, transform):
    check(emulated, case(model, transform, tasks=2))


@pytest.mark.parametrize("form", [x for x in FORMS if x != "auto"])
@pytest.mark.parametrize("transform", ["none", "psd", "factors", "scale"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"own": True},
        {"steps": 0},
        {"samples": 20, "queries": 3},
        {"first_order": True},
        {"loss": "mse", "reduction": "sum", "bias": False},
    ],
    ids=str,
)
def test_forms(emulated, options, transform, form):
    check(emulated, case("two layers", transform, **({"tasks": 2} | options), form=form))


@pytest.mark.parametrize("transform", ["psd", "factors", "left", "right"])
@pytest.mark.parametrize("model", ["head", "two layers", "norm first"])
@pytest.mark.parametrize("options", [{"own": True}, {"first_order": True}, {"steps": 3}], ids=str)
def test_adapted_transforms(emulated, model, transform, options):
    check(emulated, case(model, transform, tasks=2, adapt_transform=True, **options))


def test_adapted_parameters(emulated):
    c = case("two layers", "psd", tasks=3, form="factored")
    check(emulated, c, adapted=lambda theta: [torch.cos(x) for x in theta])
    check(
        emulated, c, torch.zeros(3).double(), lambda theta: [None] + [x.clone() for x in theta[1:]]
    )


def test_a_task_of_no_consequence(emulated):
    c = case("two layers", "psd", tasks=3)
    with torch.no_grad():
        c.data[0][1, 0, 0] = torch.nan
    operands, spec = arguments(c)
    masks = [7] * len(c.theta)
    size = emulated.inner_loop_tape(*operands, *spec.arguments)
    tape = torch.full((3, size), torch.nan, dtype=torch.float64)
    out = emulated.inner_loop_forward(*operands, tape, *spec.arguments, False)
    assert out[4].tolist() == [True, False, True]
    for weights in (torch.ones(3).double(), torch.tensor([1.0, 0.0, 1.0]).double()):
        grads = emulated.inner_loop_backward(
            weights, [], *operands, tape, *spec.arguments, False, masks, True, True
        )
        assert all([x.isfinite().all() for x in grads[:-2]])
    assert not grads[-1][1].any()
    with torch.no_grad():
        c.data[0][1, 0, 0] = 0.0
    compare(
        grads[:-2],
        torch.ops.fastkfo.inner_loop_gradient(
            *[[None if x is None else x for x in g] for g in operands[:5]],
            *[x[[0, 2]] for x in operands[5:]], *spec.arguments, False, masks, False, False,
        )[5:],
    )  # fmt: skip


def test_a_label_out_of_range_marks_its_task(emulated):
    c = case("head", "psd", tasks=2)
    c.data[3][1, 0] = 17
    operands, spec = arguments(c)
    out = emulated.inner_loop_forward(*operands, None, *spec.arguments, False)
    assert out[4].tolist() == [True, False]


def test_what_does_not_fit_lies_elsewhere(emulated, monkeypatch):
    c = case("sine", "psd", tasks=2, samples=4, queries=4, loss="mse")
    operands, spec = arguments(c)
    rest = (*operands, *spec.arguments, False, [7] * 6, True, True)
    want = torch.ops.fastkfo.inner_loop_gradient(*rest)
    monkeypatch.setenv("FASTKFO_SHARED_MEMORY", "20000")
    with pytest.raises(RuntimeError, match=r"takes \d+ bytes of shared memory") as refused:
        emulated.inner_loop_gradient(*rest)
    least = int(re.search(r"takes (\d+) bytes", str(refused.value)).group(1))
    for room in (least, 1.2 * least, 1.5 * least, 2 * least, 232_448):
        monkeypatch.setenv("FASTKFO_SHARED_MEMORY", str(int(room)))
        compare(emulated.inner_loop_gradient(*rest), want)


def test_it_is_repeatable(emulated):
    c = case("two layers", "psd", tasks=5, dtype=torch.float32)
    operands, spec = arguments(c)
    rest = (*operands, *spec.arguments, False, [7] * len(c.theta), True, True)
    for a, b in zip(
        emulated.inner_loop_gradient(*rest), emulated.inner_loop_gradient(*rest), strict=True
    ):
        assert torch.equal(a, b)
