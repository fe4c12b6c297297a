"""How far each kernel is from its floor: `python -m bench.kernels --device cuda`.

Per op, operands and derivative the time of every implementation that is there, in turns, after each
has passed a gate: in float64 its numbers are the reference's to 1e-10, and in float32 nearly as
near as the reference's own. The floor is the longer of the op's products at the rate, and its
operands and results at the bandwidth, that the same run measured. On CUDA what is timed is a graph
of many calls, so that it is the device's time alone; operands that fit are then in its cache, and a
small op may be below a floor that counts memory. On the CPU it is the wall's time.

The record is `results/<machine>/kernels.json`, on disk after every row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import alone, ceilings, clock, floors, gate, machine, measure, memory, replay
from bench import kernel_cases as of
from bench import kernel_layers as layers
from bench.kernel_cases import Case
from bench.layers import SHAPES
from bench.records import Record
from bench.row import failure
from bench.table import number
from fastkfo.kernels.selector import ImplementationUnavailable

LIMIT = 1e-10  # of the gate in float64, normwise per tensor
READING_S = 1e-3  # a reading is of so many calls as take about this
MOST_CALLS = 20
SECONDS = 1.0  # for the rounds of one row, about
# T, N, C, H: what batch norms and pools of the workloads see.
NORMS = ((32, 5, 64, 14), (16, 25, 32, 32), (4, 5, 32, 84))
POOLS = ((4, 5, 32, 84), (4, 5, 32, 42))
# Square factors: on a CPU the larger ones take minutes.
LARGE = {"cpu": (1024, 2048), "cuda": (1024, 2048, 4096, 8192)}
OPS = (
    "inner_loop", "kron_update", "large factors", "gram", "conv2d", "batch_norm", "max_pool2d",
    "avg_pool2d", "cross_entropy",
)  # fmt: skip


def cases(op: str, device: str) -> Iterator[Case]:
    """All of an op.

    Args:
        op: one of OPS.
        device: "cpu" or "cuda".

    Yields:
        What is timed, in this order.
    """
    if op == "inner_loop":
        yield from (of.fused(name) for name in ("anil-head", "sine-mlp", "omniglot-fc"))
    elif op == "large factors":
        yield from map(of.large, LARGE[device])
    elif op == "cross_entropy":
        for shape in ((16, 25, 5), (512, 25, 5)):
            yield from of.cross_entropy(*shape)
    elif op == "conv2d":
        for shape in SHAPES:
            yield from layers.conv(shape)
    elif op == "batch_norm":
        for shape in NORMS:
            yield from layers.norm(shape)
    elif op in ("max_pool2d", "avg_pool2d"):
        for shape in POOLS:
            yield from layers.pool(op, shape)
    elif op == "gram":
        yield from of.gram("omniglot-cnn", of.items_of("omniglot-cnn", 1))
    else:
        for workload in ("omniglot-cnn", "sine-mlp"):
            yield from of.kron(f"{workload} T 32", of.items_of(workload, 32))


@dataclass(frozen=True)
class Timed:
    """One implementation, ready to be read.

    Attributes:
        calls: that one reading is of.
        how: "graph", "events" or "wall".
        run: all calls.
        device: where.
    """

    calls: int
    how: str
    run: Callable[[], Any]
    device: str

    def seconds(self) -> float:
        return clock.seconds(self.run, self.device) / self.calls


def read(
    case: Case, rates: dict[str, Any], device: str, seconds: float = SECONDS
) -> dict[str, Any]:
    """The row of a case; whatever one implementation fails at is part of it.

    Args:
        case: what is timed.
        rates: of `bench.ceilings.measure`.
        device: "cpu" or "cuda".
        seconds: for its rounds, about.

    Returns:
        The row of a record.
    """
    try:
        with _beside(device):
            entries, why = _entries(case, device, seconds), None
    except Exception as error:  # the reference's own: there is nothing to hold anyone to
        entries, why = {}, failure(error)["why"]
    floor = floors.floor_seconds(case.work, rates, torch.float32)
    for entry in entries.values():
        if "us" in entry:
            entry["times_floor"] = entry["us"] / (1e6 * floor)
    return {
        "op": case.op, "case": case.case, "part": case.part, "device": device,
        **case.work._asdict(), "floor_us": 1e6 * floor, "implementations": entries, "why": why,
    }  # fmt: skip


def _entries(case: Case, device: str, seconds: float) -> dict[str, dict[str, Any]]:
    """Every implementation through the gate, and who passes timed."""
    exact = _values(case, "reference", torch.float64, device)
    theirs = _difference(_values(case, "reference", torch.float32, device), exact)
    limit = max(gate.ROUNDED_LIMIT, gate.TIMES_ORACLE * theirs)
    entries: dict[str, dict[str, Any]] = {}
    ready: dict[str, Timed] = {}
    for name in case.implementations:
        entries[name], timed = _admit(case, name, exact, limit, device)
        if timed is not None:
            ready[name] = timed
    _time(entries, ready, case, seconds)
    return entries


def _admit(
    case: Case, name: str, exact: Sequence[Tensor], limit: float, device: str
) -> tuple[dict[str, Any], Timed | None]:
    """Through the gate, in float64 and in what is timed; and made ready."""
    try:
        off = _difference(_values(case, name, torch.float64, device), exact)
        call = case.make(name, torch.float32, device)
        rounded = _difference(call(), exact)
        entry = {"status": "ok", "why": None, "gate": off, "difference": rounded}
        if not (off <= LIMIT and rounded <= limit):  # nor a NaN
            why = f"off by {off:.0e} in float64, by {rounded:.0e} in float32"
            return entry | {"status": "wrong", "why": why}, None
        return entry, _ready(call, device)
    except ImplementationUnavailable as error:
        return {"status": "missing", "why": str(error).splitlines()[0]}, None
    except Exception as error:  # one's failure is a row, not the end of the others
        return failure(error), None


def _values(case: Case, name: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [x.detach().double() for x in case.make(name, dtype, device)()]


def _difference(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Normwise, of the tensor where it is largest; one that is nearly zero counts for more."""
    if len(found) != len(exact):
        raise ValueError(f"expected {len(exact)} results, got {len(found)}")
    norms = [float(x.norm()) for x in exact]
    least = max(1e-3 * max(norms), 1e-300)
    errors = [
        float((a.double() - b).norm()) / max(norm, least)
        for a, b, norm in zip(found, exact, norms, strict=True)
    ]
    return next((e for e in errors if e != e), max(errors))  # max() would pass over a NaN


def _ready(call: of.Call, device: str) -> Timed:
    """Warm, and as a graph where it can be one."""
    for _ in range(2):
        call()
    once = clock.seconds(call, device)
    calls = max(1, min(MOST_CALLS, int(READING_S / max(once, 1e-9))))

    def repeated() -> None:
        for _ in range(calls):
            call()

    if device != "cuda":
        return Timed(calls, "wall", repeated, device)
    graph = replay.graph_of(call, calls)
    if graph is None:
        return Timed(calls, "events", repeated, device)
    graph.replay()
    return Timed(calls, "graph", graph.replay, device)


def _time(
    entries: dict[str, dict[str, Any]], ready: dict[str, Timed], case: Case, seconds: float
) -> None:
    """All in turn, into their entries."""
    if not ready:
        return
    round_s = sum(timed.seconds() * timed.calls for timed in ready.values())
    rounds = measure.rounds_for(seconds, round_s)
    samples = measure.interleaved({n: t.seconds for n, t in ready.items()}, rounds)
    for name, timed in ready.items():
        low, middle, high = measure.quartiles(samples[name])
        entries[name] |= {
            "us": 1e6 * middle, "q1_us": 1e6 * low, "q3_us": 1e6 * high,
            "how": timed.how, "calls": timed.calls, "rounds": rounds,
        }  # fmt: skip
        if case.baseline in ready and name != case.baseline:
            entries[name]["speedup"] = measure.speedup(samples[name], samples[case.baseline])


@contextmanager
def _beside(device: str) -> Iterator[None]:
    """On CUDA within a stream of its own: a backward pass runs where its forward pass did."""
    if device != "cuda":
        yield
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


def line(row: dict[str, Any]) -> str:
    """A row in a line."""
    parts = [row["why"]] if row["why"] else []
    for name, entry in row["implementations"].items():
        if "us" not in entry:
            parts.append(f"{name} {entry['status']}")
            continue
        ratio = entry.get("speedup", {}).get("median")
        than = "" if ratio is None else f", {number(ratio)} times as fast as BLAS"
        parts.append(f"{name} {number(entry['us'])} ({number(entry['times_floor'])} x{than})")
    what = f"{row['op']} {row['case']}, {row['part']}"
    return f"{what}: floor {number(row['floor_us'])} us; {'; '.join(parts)}"


def run(
    ops: Sequence[str], device: str, record: Record, until: float, tell: Callable[[str], None]
) -> None:
    """All cases of some ops into a record; none is begun after a time, by time.monotonic()."""
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, as in every other benchmark
    rates = ceilings.measure(device)
    record.begin(environment=machine.environment(device), ceilings=rates)
    for op in ops:
        for case in cases(op, device):
            if time.monotonic() > until:
                tell(f"out of time before {case.op} {case.case}, {case.part}")
                return
            row = read(case, rates, device)
            record.add(row)
            tell(line(row))
            memory.give_back(device)
    record.end()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = alone.options(__doc__, "kernels")
    parser.add_argument("--op", nargs="*", choices=OPS, default=OPS)
    given, record, until = alone.begun(parser, arguments)
    run(given.op, given.device, record, until, lambda text: print(text, flush=True))
    print(f"record: {record.path}")


if __name__ == "__main__":
    main()
