"""Whole trainings beside learn2learn's own loop, on digits: how fast, and how good.

    python -m bench.training rates        # iterations per second, interleaved; two minutes
    python -m bench.training accuracy     # every method, ten seeds, both; about eleven minutes

Both begin from the same weights and draw the same tasks. Before anything is read, three
iterations of each must give the same weights in float64. Records: `results/<machine>/training/`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import clock, machine
from bench.records import RESULTS, Record
from bench.training_loops import Ours, Theirs, distance, tested, weights
from fastkfo.training import TrainConfig, interval
from tests import oracle

# Relative, of weights in float64. Adam's first step is a sign, so that it takes more than one.
GATE, GATED = 1e-9, 3
COMMON: dict[str, Any] = {
    "dataset": "digits",
    "backbone": "plain-2x16",
    "ways": 5,
    "shots": 5,
    "queries": 5,
    "steps": 5,
    "fast_lr": 0.1,
    "meta_lr": 0.003,
    "validate_every": 0,
    "checkpoint_every": 0,
}


@dataclass(frozen=True)
class Case:
    """A method.

    Attributes:
        name: for the table.
        method: of a TrainConfig.
        options: that go with it.
        theirs: whether learn2learn has it.
    """

    name: str
    method: str
    options: tuple[tuple[str, Any], ...] = ()
    theirs: bool = True

    def config(self, **options: Any) -> TrainConfig:
        """Its config."""
        return TrainConfig(**(COMMON | {"method": self.method} | dict(self.options) | options))


CASES = [
    Case("maml", "maml"),
    Case("maml-linnet", "maml-linnet"),
    Case("meta-sgd", "meta-sgd"),
    Case("meta-curvature", "meta-curvature"),
    Case("maml-kfo, not adapted", "maml-kfo", (("adapt_transform", False),)),
    Case("maml-kfo", "maml-kfo"),
    Case("maml-kfo, 2 hidden, not adapted", "maml-kfo", (("hidden_kfo_layers", 2),), theirs=False),
    Case("anil", "anil"),
    Case("anil-kfo", "anil-kfo"),
    Case("anil-kfo, 2 hidden, not adapted", "anil-kfo", (("hidden_kfo_layers", 2),), theirs=False),
]
TIMED = ("maml-kfo", "anil-kfo")


def gate(case: Case) -> float:
    """How far both are apart after a few iterations in float64.

    Raises:
        RuntimeError: Too far.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = case.config(
            out=f"{folder}/r", dtype="float64", meta_batch=4, iterations=9, test_tasks=0
        )
        ours, theirs = Ours(config), Theirs(config, oracle.load())
        ours.advance(GATED)
        theirs.advance(GATED)
        found = distance(weights(ours), weights(theirs))
    if not found <= GATE:
        raise RuntimeError(f"{case.name}: weights differ by {found:.1e} after {GATED} iterations")
    return found


def rates(case: Case, rounds: int, block: int, meta_batch: int) -> dict[str, Any]:
    """Iterations per second of both, block by block in turn."""
    gated = gate(case)
    with tempfile.TemporaryDirectory() as folder:
        config = case.config(
            out=f"{folder}/r", meta_batch=meta_batch, iterations=10**9, test_tasks=0
        )
        sides: list[Ours | Theirs] = [Ours(config), Theirs(config, oracle.load())]
        seconds: dict[str, list[float]] = {side.name: [] for side in sides}
        elsewhere = clock.Elsewhere()
        for index in range(rounds + 1):
            # The order turns with every round.
            for side in sides if index % 2 else sides[::-1]:
                start = time.perf_counter()
                side.advance(block)
                if index:  # the first warms up
                    seconds[side.name].append((time.perf_counter() - start) / block)
        busy = elsewhere.cores()
        apart = distance(weights(sides[0]), weights(sides[1]))
    ratios = [b / a for a, b in zip(seconds["fastkfo"], seconds["learn2learn"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "case": case.name,
        "config": config.to_mapping() | {"out": ""},
        "rounds": rounds,
        "block": block,
        "gate": gated,
        "apart_in_float32": apart,
        "seconds_per_iteration": seconds,
        "per_second": {k: round(1 / statistics.median(v), 2) for k, v in seconds.items()},
        "ratio": [round(q, 2) for q in quartiles],
        "busy_elsewhere": None if busy is None else round(busy, 2),
    }


def one_training(case: Case, seed: int, who: str, options: dict[str, Any]) -> dict[str, Any]:
    """Trains one learner from one seed, and tests it; runs in a process of its own."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = case.config(out=f"{folder}/r", seed=seed, **options)
        start = time.perf_counter()
        untested = config.changed(test_tasks=0)  # the test is the same for both, below
        side: Ours | Theirs
        side = Ours(untested) if who == "fastkfo" else Theirs(untested, oracle.load())
        side.advance(config.iterations)
        trained = time.perf_counter() - start
        found = tested(side, config)
    return {
        "seed": seed,
        "after": found.after.mean,
        "before": found.before.mean,
        "not_finite": found.not_finite,
        "train_s": round(trained, 2),
    }


def accuracies(
    cases: list[Case], seeds: int, processes: int, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One row per method, in order, as its trainings end."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        jobs = {}
        for case in cases:
            for who in ("fastkfo", "learn2learn") if case.theirs else ("fastkfo",):
                jobs[case.name, who] = [
                    pool.submit(one_training, case, seed, who, options) for seed in range(seeds)
                ]
        for case in cases:
            gated = gate(case) if case.theirs else None
            found = {
                who: [job.result() for job in trainings]
                for (name, who), trainings in jobs.items()
                if name == case.name
            }
            yield {"case": case.name, **asdict(case), "gate": gated, "runs": found} | _summed(found)


def _summed(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over seeds, with intervals; the difference is taken seed by seed."""
    scores = {who: torch.tensor([run["after"] for run in runs]) for who, runs in found.items()}
    summed: dict[str, Any] = {"accuracy": {who: interval(s) for who, s in scores.items()}}
    if len(scores) == 2:
        summed["difference"] = interval(scores["fastkfo"] - scores["learn2learn"])
    summed["train_s"] = {who: sum(run["train_s"] for run in runs) for who, runs in found.items()}
    return summed


def rates_table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(
        "method", "fastkfo it/s", "learn2learn it/s", "ratio (quartiles)", "busy elsewhere"
    )
    for row in rows:
        low, middle, high = row["ratio"]
        speed = row["per_second"]
        shown.add_row(
            row["case"],
            f"{speed['fastkfo']:.2f}",
            f"{speed['learn2learn']:.2f}",
            f"{middle:.2f} ({low:.2f}-{high:.2f})",
            str(row["busy_elsewhere"]),
        )
    return shown


def accuracy_table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(
        "method", "fastkfo %", "learn2learn %", "difference", "s, fastkfo", "s, learn2learn"
    )
    for row in rows:
        seconds = row["train_s"]
        shown.add_row(
            row["case"],
            _percent(row["accuracy"].get("fastkfo")),
            _percent(row["accuracy"].get("learn2learn")),
            _percent(row.get("difference")),
            f"{seconds['fastkfo']:.0f}",
            f"{seconds['learn2learn']:.0f}" if "learn2learn" in seconds else "",
        )
    return shown


def _percent(found: Any) -> str:
    if found is None:
        return ""
    mean, half = found
    return f"{100 * mean:.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("mode", choices=("rates", "accuracy"))
    parser.add_argument("--methods", nargs="*", help=f"of {', '.join(c.name for c in CASES)}")
    parser.add_argument("--meta-batch", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block", type=int, default=10, help="iterations between clock readings")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--test-tasks", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--name", help="of the record; default: the mode's")
    given = parser.parse_args()
    names = given.methods or (TIMED if given.mode == "rates" else [c.name for c in CASES])
    if unknown := set(names) - {case.name for case in CASES}:
        parser.error(f"--methods: unknown {', '.join(sorted(unknown))}")
    cases = [case for case in CASES if case.name in names]
    torch.set_num_threads(1)
    folder = RESULTS / machine.name("cpu") / "training"
    record = Record(folder / f"{given.name or given.mode}.json")
    record.begin(mode=given.mode, environment=machine.environment("cpu"), options=vars(given))
    console, rows = Console(), []
    for row in _read(given, cases):
        rows.append(row)
        record.add(row)
        console.print(f"{row['case']}: done", markup=False)
    record.end()
    console.print(rates_table(rows) if given.mode == "rates" else accuracy_table(rows))
    console.print(f"Record: {Path(record.path).relative_to(machine.ROOT)}", soft_wrap=True)


def _read(given: argparse.Namespace, cases: list[Case]) -> Iterator[dict[str, Any]]:
    if given.mode == "rates":
        for case in cases:
            yield rates(case, given.rounds, given.block, given.meta_batch or 16)
        return
    options = {
        "iterations": given.iterations,
        "meta_batch": given.meta_batch or 4,
        "test_tasks": given.test_tasks,
    }
    yield from accuracies(cases, given.seeds, given.processes, options)


#: Chosen so that `accuracy` takes some eleven minutes on two cores.
ITERATIONS = 120

if __name__ == "__main__":
    main()
