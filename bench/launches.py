"""How many kernels a meta-gradient launches, and what each costs: `python -m bench.launches`.

For `InnerLoop` as it is and replaying its recording: kernels (copies and fills count) and time of
one meta-gradient; and of one graph of the whole call, what a replay takes for each of its nodes,
which kernels take it, and how much of it is between them. On the CPU, where nothing is recorded,
operations are those that are dispatched. Both instances' gradients must agree first.

The record is `results/<machine>/launches.json`, on disk after every row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench import alone, dispatches, gate, machine, measure, memory, replay
from bench.peers.base import InProcess
from bench.peers.inner_loop_peer import InnerLoop
from bench.problem import Problem
from bench.records import Record
from bench.row import failure
from bench.table import number

# T that is not the workload's own.
WORKLOADS = {"anil-head": None, "sine-mlp": None, "omniglot-cnn": 32, "cifarfs-cnn-2": 16}
MOST_NAMES = 15  # kernels that are listed, by their time
NAME = 90  # characters of one's name
ROUNDS = 9


def read(problem: Problem) -> dict[str, Any]:
    """The row of a problem.

    Args:
        problem: what is computed.

    Returns:
        ``launched`` with operations and milliseconds of each, ``graph`` (None on the CPU), and
        ``why`` there is neither.
    """
    dtype = str(problem.dtype).removeprefix("torch.")
    row: dict[str, Any] = {**asdict(problem), "dtype": dtype, "launched": {}, "graph": None}
    made: list[InProcess] = []
    try:
        eager = InnerLoop("eager", capture=False).prepare(problem)
        replaying = InnerLoop("replaying").prepare(problem)
        made = [eager, replaying]
        off = gate.difference(replaying.gradient(), eager.gradient())
        row["difference"] = off.whole
        if not off.whole <= gate.ROUNDED_LIMIT:  # nor a NaN
            raise RuntimeError(f"replaying and not, gradients differ: {off.text()}")
        row["launched"] = {"eager": _cost(eager), "replaying": _cost(replaying)}
        if problem.device == "cuda":
            row["graph"] = _graph(eager)
    except Exception as error:
        return row | {"why": failure(error)["why"]}
    finally:
        for prepared in made:
            prepared.close()
    return row | {"why": None}


def _cost(prepared: InProcess) -> dict[str, Any]:
    """Operations of one meta-gradient and what it takes, as a user would call it."""
    operations = prepared.launches()
    times = [prepared.seconds() for _ in range(ROUNDS)]
    found = {"operations": operations, **measure.times(times)}
    return found | {"us_per_operation": 1e3 * found["median_ms"] / max(operations or 0, 1)}


def _graph(prepared: InProcess) -> dict[str, Any] | None:
    """One graph of the whole call; None if it cannot be captured."""
    assert prepared.capturable is not None
    graph = replay.graph_of(prepared.capturable)
    if graph is None:
        return None
    seconds = replay.replayed(graph)
    return nodes(dispatches.kernels(graph.replay), seconds)


def nodes(kernels: Sequence[tuple[str, float]], seconds: float) -> dict[str, Any]:
    """What a replay is made of.

    Args:
        kernels: name and seconds of each node.
        seconds: of a replay that was not traced.

    Returns:
        ``nodes``, ``ms``, ``us_per_node``, ``busy_ms`` (within kernels) and ``top``: name, count
        and milliseconds of those that take longest.
    """
    by_name: dict[str, list[float]] = {}
    for name, taken in kernels:
        by_name.setdefault(name[:NAME], []).append(taken)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:MOST_NAMES]
    return {
        "nodes": len(kernels),
        "ms": 1e3 * seconds,
        "us_per_node": 1e6 * seconds / max(len(kernels), 1),
        "busy_ms": 1e3 * sum(taken for _, taken in kernels),
        "median_kernel_us": 1e6 * statistics.median(t for _, t in kernels) if kernels else None,
        "top": [[name, len(taken), round(1e3 * sum(taken), 4)] for name, taken in longest],
    }


def line(row: dict[str, Any]) -> str:
    """A row in a line."""
    what = f"{row['workload']} {row['method']} T{row['tasks']} K{row['steps']}"
    if row["why"]:
        return f"{what}: {row['why']}"
    parts = [
        f"{name} {found['operations']:,} in {number(found['median_ms'])} ms"
        for name, found in row["launched"].items()
    ]
    if row["graph"]:
        graph = row["graph"]
        parts.append(
            f"its graph {graph['nodes']:,} nodes in {number(graph['ms'])} ms, "
            f"{number(graph['us_per_node'])} us each, {number(graph['busy_ms'])} ms in kernels"
        )
    return f"{what}: {'; '.join(parts)}"


def run(
    problems: Sequence[Problem], record: Record, until: float, tell: Callable[[str], None]
) -> None:
    """All problems into a record; none is begun after a time, by time.monotonic()."""
    torch.backends.cudnn.allow_tf32 = False  # as in every other benchmark
    device = problems[0].device
    record.begin(environment=machine.environment(device))
    for problem in problems:
        if time.monotonic() > until:
            tell(f"out of time before {problem.label}")
            return
        row = read(problem)
        record.add(row)
        tell(line(row))
        memory.give_back(device)
    record.end()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = alone.options(__doc__, "launches")
    parser.add_argument("--workload", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--method", default="kfo")
    parser.add_argument("--tasks", type=int, help="instead of the workload's")
    given, record, until = alone.begun(parser, arguments)
    problems = [
        Problem.named(name, given.method, tasks=given.tasks or WORKLOADS[name], device=given.device)
        for name in given.workload
    ]
    run(problems, record, until, lambda text: print(text, flush=True))
    print(f"record: {record.path}")


if __name__ == "__main__":
    main()
