"""One row: a problem, every peer through the gate, then all of them timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from bench import clock, floors, gate, measure, replay
from bench.peers import ORACLE, peer
from bench.peers.base import Prepared
from bench.problem import Gradient, Problem

Tell = Callable[[str], None]
Entries = dict[str, dict[str, Any]]
REPLAYED_BELOW_S = 0.1


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
        seconds: for all of this row, about; every peer is timed a few times at least.
        ceilings: of this machine, see bench/ceilings.py.
        tell: is told what is being done.

    Returns:
        The row of a record. Whatever one peer fails at is part of it.
    """
    begin = time.perf_counter()
    tell(f"{problem.label}: oracle")
    oracle = Oracle.of(problem)
    entries: Entries = {}
    ready: dict[str, Prepared] = {}
    try:
        for name in names:
            tell(f"{problem.label}: {name} through the gate")
            entries[name], prepared = admit(name, problem, oracle)
            if prepared is not None:
                ready[name] = prepared
        tell(f"{problem.label}: timing")
        about = compare(entries, ready, seconds - (time.perf_counter() - begin))
        for name in list(ready):
            tell(f"{problem.label}: memory and launches of {name}")
            guarded(name, entries, ready, partial(_rest, entry=entries[name], oracle=oracle))
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
        **about,
        "peers": entries,
        "floors": floor,
        "took_s": time.perf_counter() - begin,
    }


@dataclass(frozen=True)
class Oracle:
    """What gradients are held against.

    Attributes:
        exact: learn2learn's in float64.
        rounded: how far off a gradient in the problem's own precision may be, normwise.
    """

    exact: Gradient
    rounded: float

    @classmethod
    def of(cls, problem: Problem) -> Oracle:
        exact = _gradient_once(ORACLE, problem.to(torch.float64))
        if problem.dtype == torch.float64:
            return cls(exact, gate.LIMIT)
        theirs = gate.difference(_gradient_once(ORACLE, problem), exact).whole
        return cls(exact, max(gate.ROUNDED_LIMIT, gate.TIMES_ORACLE * theirs))


def admit(name: str, problem: Problem, oracle: Oracle) -> tuple[dict[str, Any], Prepared | None]:
    """A peer's entry so far; and the peer made ready, unless there is nothing to be timed."""
    implementation = peer(name)
    if reason := implementation.missing():
        return {"status": "missing", "why": reason}, None
    if reason := implementation.declines(problem):
        return {"status": "declines", "why": reason}, None
    prepared: Prepared | None = None
    try:
        found = gate.difference(_gradient_once(name, problem.to(torch.float64)), oracle.exact)
        prepared = implementation.prepare(problem)
        entry = {
            "status": "ok" if found.passes else "wrong",
            "why": None if found.passes else found.text(),
            "gate": found.record(),
            "compile_s": prepared.compile_s,
        }
        _check_rounded(entry, prepared, oracle)
    except Exception as error:  # one peer's failure is a row, not the end of the others
        if prepared is not None:
            prepared.close()
        return failure(error), None
    return entry, prepared


def _check_rounded(entry: dict[str, Any], prepared: Prepared, oracle: Oracle) -> None:
    """Holds the very instance that is timed to the oracle, in its own precision."""
    off = gate.difference(prepared.gradient(), oracle.exact).whole
    entry["difference"] = off
    if entry["status"] == "ok" and not off <= oracle.rounded:
        entry |= {"status": "wrong", "why": f"wrong by {off:.0e} in the precision that is timed"}
        entry.pop("speedup", None)


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
    # XLA's word for it, out of the worker; and what a failed recording tells of PyTorch's.
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text:
        status = "out of memory"
    return {"status": status, "why": f"{type(error).__name__}: {text}"[:200]}


def compare(
    entries: Entries, ready: dict[str, Prepared], seconds: float, most: int = measure.MOST
) -> dict[str, Any]:
    """Samples, medians and ratios into the entries. The gradients computed before were warm-up.

    Args:
        entries: of the peers, by name.
        ready: who is timed; who fails is taken out.
        seconds: for all rounds, about.
        most: rounds.

    Returns:
        How many rounds these were, and how many cores were at other work meanwhile.
    """

    def once(name: str) -> float:
        return guarded(name, entries, ready, lambda prepared: prepared.seconds()) or 0.0

    rounds = measure.rounds_for(seconds, sum(once(name) for name in list(ready)), most)
    others = clock.Elsewhere([p.pid for p in ready.values() if p.pid is not None])
    recorded = {name: prepared.recordings() for name, prepared in ready.items()}
    samples = measure.interleaved({n: lambda n=n: once(n) for n in ready}, rounds)
    busy = others.cores()
    for name, prepared in ready.items():  # those that are left
        entries[name] |= {"samples_s": samples[name], **measure.times(samples[name])}
        meanwhile = prepared.recordings() - recorded[name]
        entries[name]["recorded_meanwhile"] = meanwhile
        if entries[name]["status"] == "ok" and _is_baseline(entries.get(ORACLE)):
            found = measure.speedup(samples[name], samples[ORACLE])
            found["unstable"] |= busy is not None and busy > measure.BUSY_CORES
            found["unstable"] |= meanwhile > 0
            entries[name]["speedup"] = found
    return {"rounds": rounds, "busy_elsewhere": busy}


def _is_baseline(entry: dict[str, Any] | None) -> bool:
    return entry is not None and entry["status"] == "ok" and "samples_s" in entry


def guarded(
    name: str, entries: Entries, ready: dict[str, Prepared], run: Callable[[Prepared], Any]
) -> Any:
    """Runs; whoever fails is out, keeps what the gate said, and takes nobody along."""
    if name not in ready:
        return None
    try:
        return run(ready[name])
    except Exception as error:
        entries[name] |= failure(error)
        entries[name].pop("speedup", None)
        ready.pop(name).close()
        return None


def _rest(prepared: Prepared, entry: dict[str, Any], oracle: Oracle) -> None:
    """What is read once; and the gradient once more, now that the rounds are over."""
    entry["peak_bytes"] = prepared.peak_bytes()
    entry["launches"] = prepared.launches()
    entry["replay_ms"] = _replay_ms(prepared, entry)
    _check_rounded(entry, prepared, oracle)


def _replay_ms(prepared: Prepared, entry: dict[str, Any]) -> float | None:
    """Of a small problem on a GPU, where launches are most of the time."""
    run = prepared.capturable
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
