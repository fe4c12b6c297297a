"""One row: a problem, every peer through the gate, then all of them timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench import floors, gate, measure, replay
from bench.peers import ORACLE, peer
from bench.peers.base import Prepared
from bench.problem import Gradient, Problem

Tell = Callable[[str], None]
REPLAYED_BELOW_S = 0.02


def read(
    problem: Problem,
    names: Sequence[str],
    seconds: float,
    ceilings: dict[str, Any],
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Measure a problem.

    Args:
        problem: what is computed.
        names: of the peers.
        seconds: for all of this row, about; every peer is timed three times at least.
        ceilings: of this machine, see bench/ceilings.py.
        tell: is told what is being done.

    Returns:
        The row of a record.
    """
    begin = time.perf_counter()
    tell(f"{problem.label}: oracle")
    oracle = oracle_of(problem)
    entries: dict[str, dict[str, Any]] = {}
    ready: dict[str, Prepared] = {}
    try:
        for name in names:
            tell(f"{problem.label}: {name} through the gate")
            entries[name], prepared = admit(name, problem, oracle)
            if prepared is not None:
                ready[name] = prepared
        tell(f"{problem.label}: timing")
        left = seconds - (time.perf_counter() - begin)
        _time(entries, ready, left, lambda: tell(f"{problem.label}: timing"))
        for name, prepared in ready.items():
            tell(f"{problem.label}: memory and launches of {name}")
            entries[name] |= {
                "peak_bytes": prepared.peak_bytes(),
                "launches": prepared.launches(),
                "replay_ms": _replay_ms(prepared, entries[name]),
            }
    finally:
        for prepared in ready.values():
            prepared.close()
    floor = _floors(problem, ceilings)
    for entry in entries.values():
        if "median_ms" in entry:
            entry["times_floor"] = entry["median_ms"] / floor["least_ms"]
    return {
        **asdict(problem),
        "dtype": str(problem.dtype).removeprefix("torch."),
        "peers": entries,
        "floors": floor,
        "took_s": time.perf_counter() - begin,
    }


def oracle_of(problem: Problem) -> Gradient:
    """learn2learn's meta-gradient in float64."""
    return peer(ORACLE).prepare(problem.to(torch.float64)).gradient()


def admit(name: str, problem: Problem, oracle: Gradient) -> tuple[dict[str, Any], Prepared | None]:
    """A peer's entry so far; and the peer made ready, unless there is nothing to be timed."""
    implementation = peer(name)
    if reason := implementation.missing():
        return {"status": "missing", "why": reason}, None
    if reason := implementation.declines(problem):
        return {"status": "declines", "why": reason}, None
    try:
        exact = _gradient_once(name, problem.to(torch.float64))
        found = gate.difference(exact, oracle)
        prepared = implementation.prepare(problem)
        same_precision = gate.difference(prepared.gradient(), oracle)
    except Exception as error:  # one peer's failure is a row, not the end of the others
        return failure(error), None
    entry = {
        "status": "ok" if found.passes else "wrong",
        "why": None if found.passes else found.text(),
        "gate": found.record(),
        # For information: a ReLU that rounding switches moves it by 1e-3, for any peer.
        "difference": same_precision.whole,
        "compile_s": prepared.compile_s,
    }
    return entry, prepared


def _gradient_once(name: str, problem: Problem) -> Gradient:
    prepared = peer(name).prepare(problem)
    try:
        return prepared.gradient()
    finally:
        prepared.close()


def failure(error: Exception) -> dict[str, Any]:
    """An entry that says what went wrong."""
    status = {
        TimeoutError: "gave up",
        MemoryError: "out of memory",
        torch.OutOfMemoryError: "out of memory",
    }.get(type(error), "failed")
    text = (str(error).strip() or "no message").splitlines()[0]
    if "RESOURCE_EXHAUSTED" in text:  # XLA's word for it, out of the worker
        status = "out of memory"
    return {"status": status, "why": f"{type(error).__name__}: {text}"[:200]}


def _time(
    entries: dict[str, dict[str, Any]],
    ready: dict[str, Prepared],
    seconds: float,
    after: Callable[[], None],
) -> None:
    """Samples, medians and ratios into the entries. The gradients computed before were warm-up."""
    if not ready:
        return
    once = {name: prepared.seconds() for name, prepared in ready.items()}
    rounds = measure.rounds_for(seconds, sum(once.values()))
    runs = {name: prepared.seconds for name, prepared in ready.items()}
    samples = measure.interleaved(runs, rounds, after)
    for name, taken in samples.items():
        entries[name] |= {"samples_s": taken, **measure.times(taken)}
        if entries[name]["status"] == "ok" and ORACLE in samples:
            entries[name]["speedup"] = measure.speedup(taken, samples[ORACLE])


def _replay_ms(prepared: Prepared, entry: dict[str, Any]) -> float | None:
    """Of a small problem on a GPU, where launches are most of the time."""
    run = getattr(prepared, "capturable", None)
    if run is None or entry["median_ms"] > 1e3 * REPLAYED_BELOW_S:
        return None
    taken = replay.seconds(run)
    return None if taken is None else 1e3 * taken


def _floors(problem: Problem, ceilings: dict[str, Any]) -> dict[str, Any]:
    """Each algorithm's counts and the least time this machine could do them in."""
    algorithms = {
        name: {
            **count._asdict(),
            "ms": 1e3 * floors.floor_seconds(count, ceilings, problem.dtype),
        }
        for name, count in floors.count(problem).items()
        if name != "unrolled"
    }
    return {**algorithms, "least_ms": min(a["ms"] for a in algorithms.values())}
