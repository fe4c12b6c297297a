"""`bench.kernels`: what is counted, who passes the gate, what is kept. No reading is tested."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import kernel_cases as of
from bench import kernel_layers as layers
from bench import kernels, products
from bench.floors import Count
from bench.kernel_cases import Case
from bench.records import load
from fastkfo.functional import kron_update
from tests.bench_rows import RATES

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called

ITEMS = [(3, 4, 5), (2, 3, 1), (1, 6, 2)]
SMALL = [
    of.fused("anil-head", tasks=2, steps=2, width=8),
    of.fused("sine-mlp", tasks=2, steps=1, width=4),
    of.fused("omniglot-fc", tasks=2, steps=1, width=16),
    *of.kron("small", ITEMS),
    of.large(24),
    *of.gram("small", ITEMS),
    *of.cross_entropy(2, 4, 3),
    *layers.conv((2, 3, 4, 7, 5, 2)),
    *layers.norm((2, 3, 4, 5)),
    *layers.pool("max_pool2d", (2, 3, 4, 7)),
    *layers.pool("avg_pool2d", (2, 3, 4, 7)),
]


def named(case):
    return f"{case.op} {case.part}"


@pytest.mark.parametrize("case", SMALL, ids=named)
def test_every_case(case):
    row = kernels.read(case, RATES, "cpu", 0.0)
    assert row["why"] is None
    for name, entry in row["implementations"].items():
        if name == "triton":  # there is no GPU that it would need
            assert entry["status"] == "missing"
            assert "triton" in entry["why"]
            continue
        assert entry["status"] == "ok", (name, entry)
        assert entry["gate"] <= kernels.LIMIT
        assert entry["times_floor"] == pytest.approx(entry["us"] / row["floor_us"])
        assert entry["how"] == "wall"
    assert {"native", "reference"} <= set(row["implementations"])
    assert "triton missing" in kernels.line(row) or "triton" not in row["implementations"]


def test_every_op_has_cases():
    for device in ("cpu", "cuda"):
        assert [next(kernels.cases(op, device)).op for op in kernels.OPS] == list(kernels.OPS)
    conv = list(kernels.cases("conv2d", "cpu"))
    assert len(conv) == 3 * len(kernels.SHAPES)
    assert len({(case.case, case.part) for case in conv}) == len(conv)
    assert [case.case for case in kernels.cases("large factors", "cuda")][-1] == "8192 x 8192"


@pytest.mark.parametrize("items", [ITEMS, [(7, 2, 9)]], ids=str)
def test_products_of_kron_are_those_of_an_algorithm(items):
    """Written out with every product once, they are as many, and give autograd's numbers."""
    for n, m in {(n, m) for _, n, m in items}:
        check_algorithm(5, n, m)
    forward = sum(products.Kron(*item).once for item in items)
    assert of.kron_work(items, 0).flops == forward


def check_algorithm(batch, n, m):
    g, dg, v = torch.randn(3, batch, n, m, dtype=torch.float64).unbind()
    a, da = torch.randn(2, n, n, dtype=torch.float64).unbind()
    c, dc = torch.randn(2, m, m, dtype=torch.float64).unbind()
    x = [t.requires_grad_() for t in (g, a, c, v)]
    theta = torch.zeros_like(g)
    (y,) = kron_update([theta], [g], [a], [c], lr=-1.0)
    first = torch.autograd.grad(y, x[:3], v, create_graph=True)
    second = torch.autograd.grad(first, x, (dg, da, dc))
    turned = m > n  # the mirror image: transposed, with A and C exchanged
    given = [t.detach().mT for t in (g, v, dg, c, da, dc)] if turned else None
    with torch.no_grad():
        if turned:
            g_, v_, dg_ = given[:3]
            algorithm = (g_, v_, dg_, c.mT, a.mT, dc.mT, da.mT)
        else:
            algorithm = (g, v, dg, a, c, da, dc)
        algorithm = [t.detach() for t in algorithm]
        for order, expected in ((1, first), (2, second)):
            with FlopCounterMode(display=False) as counted:
                found = (backward if order == 1 else double_backward)(*algorithm)
            assert counted.get_total_flops() == of.kron_work([(batch, n, m)], order).flops
            if turned:  # G, A, C and V
                found = [found[0].mT, found[2].mT, found[1].mT, *[t.mT for t in found[3:]]]
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs.detach())


def rows(x):
    """[B, n, m] as [n, B m]: one product by a matrix from the left."""
    return x.movedim(0, 1).flatten(1)


def by_left(a, x):
    return (a @ rows(x)).unflatten(1, (len(x), -1)).movedim(1, 0)


def by_right(x, c):
    return (x.flatten(0, 1) @ c).unflatten(0, x.shape[:2])


def backward(g, v, dg, a, c, da, dc):
    """Z, G C, Z Cᵀ, V (G C)ᵀ and GᵀZ: two products by n numbers, three by m."""
    z, p = by_left(a.mT, v), by_right(g, c)
    return by_right(z, c.mT), rows(v) @ rows(p).mT, g.flatten(0, 1).mT @ z.flatten(0, 1)


def double_backward(g, v, dg, a, c, da, dc):
    p, z = by_right(g, c), by_left(a.mT, v)
    dp = by_right(dg, c) + by_right(g, dc)
    dz = by_left(da.mT, v)
    to_v = by_left(a, dp) + by_left(da, p)
    to_g = by_right(dz, c.mT) + by_right(z, dc.mT)
    to_a = rows(v) @ rows(dp).mT
    to_c = dg.flatten(0, 1).mT @ z.flatten(0, 1) + g.flatten(0, 1).mT @ dz.flatten(0, 1)
    return to_g, to_a, to_c, to_v


def test_bytes_are_operands_and_results():
    x, y = 2 * 3 * 4 * 49, 2 * 3 * 5 * 16
    assert next(layers.conv((2, 3, 4, 7, 5, 2))).work.bytes == 4 * (x + y + 2 * 5 * 4 * 9)
    numbers = 2 * 3 * 4 * 25
    assert [case.work.bytes for case in layers.norm((2, 3, 4, 5))] == [
        4 * k * numbers for k in (2, 3, 5)
    ]
    assert of.large(10).work == Count(4 * 10**3, 4 * 5 * 10**2)


def made(values):
    """A case whose implementations give what they are told to."""

    def make(name, dtype, device):
        value = values[name]
        return lambda: [value(dtype) if callable(value) else torch.tensor([value], dtype=dtype)]

    return Case("made", "up", "forward", Count(100, 100), make, tuple(values))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (1.0 + 1e-9, "off by 1e-09 in float64"),
        (float("nan"), "off by nan"),
        (lambda dtype: torch.full((1,), 1.1 if dtype == torch.float32 else 1.0, dtype=dtype),
         "by 1e-01 in float32"),
    ],
)  # fmt: skip
def test_gate_refuses(wrong, why):
    entries = kernels.read(made({"native": wrong, "reference": 1.0}), RATES, "cpu", 0.0)
    entry = entries["implementations"]["native"]
    assert entry["status"] == "wrong"
    assert why in entry["why"]
    assert "us" not in entry
    assert "native wrong" in kernels.line(entries)
    assert entries["implementations"]["reference"]["us"] > 0


def test_who_fails_takes_nobody_along():
    def fail(dtype):
        raise RuntimeError("170 KiB of shared memory\nand more")

    row = kernels.read(made({"native": fail, "reference": 1.0}), RATES, "cpu", 0.0)
    assert row["implementations"]["native"]["why"] == "RuntimeError: 170 KiB of shared memory"
    assert row["implementations"]["reference"]["status"] == "ok"
    row = kernels.read(made({"native": 1.0, "reference": fail}), RATES, "cpu", 0.0)
    assert row["implementations"] == {}
    assert "shared memory" in row["why"]


def test_ratios_are_to_the_baseline():
    entries = kernels.read(of.large(16), RATES, "cpu", 0.0)["implementations"]
    assert "speedup" not in entries["BLAS"]
    assert entries["native"]["speedup"]["median"] > 0


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(kernels.ceilings, "measure", lambda device: RATES)
    monkeypatch.setattr(kernels, "cases", lambda op, device: iter([made({"reference": 1.0})]))
    monkeypatch.setattr(kernels, "SECONDS", 0.0)


def test_record(few, tmp_path, capsys):
    kernels.main(["--results", str(tmp_path), "--op", "gram", "conv2d"])
    (path,) = tmp_path.rglob("kernels.json")
    (run,) = load(path)
    assert run["complete"]
    assert len(run["rows"]) == 2
    assert capsys.readouterr().out.count("floor") == 2


def test_out_of_time(few, tmp_path, capsys):
    kernels.main(["--results", str(tmp_path), "--minutes", "0"])
    assert "out of time before made up, forward" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_cuda_where_there_is_none(few, capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--device", "cuda"])
    assert "expected a machine with CUDA" in capsys.readouterr().err


ON_A_GPU = ("meta-gradient", "double backward", "weights")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [c for c in SMALL[:1] + SMALL[3:] if c.part in ON_A_GPU or c.baseline], ids=named
)
def test_cases_on_a_gpu(case):
    row = kernels.read(case, RATES, "cuda", 0.0)
    assert row["why"] is None
    for name, entry in row["implementations"].items():
        assert entry["status"] in ("ok", "missing"), (name, entry)
        if entry["status"] == "ok" and name != "reference":
            assert entry["how"] == "graph", name
