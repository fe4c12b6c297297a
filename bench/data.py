"""Bookkeeping and the drawing of tasks, beside learn2learn's compiled Cython.

    CYTHON=path/to/cython python -m bench.data      # a minute

learn2learn's .pyx files are compiled here, as its own setup does it; the generated C that it ships
is too old for Python 3.11. Cython 0.29.37 is the last of the line that it was written for. Without
`cython`, or a compiler, its text runs as plain Python, and the record says so. Both draw the same
tasks, which is checked first. Blocks of both alternate, each after a garbage collection, since
learn2learn's closures are cycles, whose collection would else be charged to whoever comes next.
Data sets and books are out of the collector's sight. Records: `results/<machine>/data/`.
"""

from __future__ import annotations

import gc
import importlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, TensorDataset

import fastkfo
from bench import machine
from bench.records import write_rows
from tests.data_oracle import learn2learn_data

SAMPLES, WAYS, SHOTS, BLOCKS = 100_000, 5, 10, 9
MODULES = ("meta_dataset", "task_dataset", "transforms")


def compiled(data: Any) -> str:
    """Put what Cython makes in the place of what runs as Python; return which it is."""
    cython = shutil.which(os.environ.get("CYTHON", "cython"))
    compiler = shutil.which("cc")
    if cython is None or compiler is None:
        return "its text, run as Python"
    folder = Path(tempfile.mkdtemp()) / "learn2learn" / "data"
    shutil.copytree(data.__path__[0], folder)
    (folder.parent / "__init__.py").touch()
    flags = ["-O2", "-DNDEBUG", "-fPIC", "-shared", f"-I{sysconfig.get_path('include')}"]
    for name in MODULES:
        path = f"learn2learn/data/{name}"
        for command in (
            [cython, "-3", "-X", "embedsignature=True", f"{path}.pyx"],
            [compiler, *flags, f"{path}.c", "-o", f"{path}.so"],
        ):
            subprocess.run(command, cwd=folder.parent.parent, check=True, capture_output=True)
        sys.modules.pop(f"learn2learn.data.{name}")
    data.__path__ = [str(folder)]
    for name in MODULES:
        module = importlib.import_module(f"learn2learn.data.{name}")
        vars(data).update({k: v for k, v in vars(module).items() if isinstance(v, type)})
        setattr(data, name, module)
    said = subprocess.run([cython, "--version"], capture_output=True, text=True, check=True)
    return f"{(said.stdout + said.stderr).strip()}, cc -O2"


def sample_sets() -> None:
    """`random.sample` takes sets again, as up to Python 3.10: learn2learn's NWays needs it."""
    plain = random.sample

    def sample(population: Any, k: int) -> list[Any]:
        return plain(tuple(population) if isinstance(population, set) else population, k=k)

    random.sample = sample  # type: ignore[assignment]


class Plain(Dataset[Any]):
    """Samples whose loading costs next to nothing, of which nothing is known without it."""

    def __init__(self, x: torch.Tensor, labels: list[int]) -> None:
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.x[i], self.labels[i]


def chains(lib: Any, dataset: Any) -> dict[str, list[Any]]:
    """The transforms of a task, by what they begin with."""
    t, half = lib.transforms, list(dataset.labels)[::2]
    last = [t.LoadData(dataset), t.RemapLabels(dataset), t.ConsecutiveLabels(dataset)]
    ways, shots = t.NWays(dataset, WAYS), t.KShots(dataset, SHOTS)
    return {
        "NWays, KShots": [ways, shots, *last],
        "FusedNWaysKShots": [t.FusedNWaysKShots(dataset, WAYS, SHOTS), *last],
        "FilterLabels, NWays, KShots": [t.FilterLabels(dataset, half), ways, shots, *last],
        "LoadData, NWays, KShots": [last[0], ways, shots, *last[1:]],
    }


def block(call: Callable[[], Any], seconds: float = 0.1) -> float:
    """Milliseconds per call, the garbage collections that it causes included."""
    gc.collect()
    begin, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - begin < seconds:
        call()
        calls += 1
    return 1e3 * (time.perf_counter() - begin) / calls


def row(what: str, calls: dict[str, Callable[[], Any]], **about: Any) -> dict[str, Any]:
    """Medians of alternating blocks, and the ratio of each round."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(BLOCKS):
        for name in list(calls)[:: 1 if i % 2 else -1]:
            found[name].append(block(calls[name]))
    ratios = sorted(a / b for a, b in zip(found["learn2learn"], found["fastkfo"], strict=True))
    ms = {name: float(f"{statistics.median(values):.3g}") for name, values in found.items()}
    spread = [float(f"{ratios[i]:.3g}") for i in (BLOCKS // 2, BLOCKS // 4, -1 - BLOCKS // 4)]
    made = {"what": what, **about, "ms": ms, "ratio": spread[0], "quartiles": spread[1:]}
    print(made, flush=True)
    return made


def same(tasksets: dict[str, Any]) -> bool:
    """Whether the same seed gives the same tasks."""
    found = []
    for tasks in tasksets.values():
        random.seed(0)
        drawn = [tasks.sample() for _ in range(3)]
        found.append(torch.stack([torch.cat([x, y[:, None]], 1) for x, y in drawn]))
    return torch.equal(*found)


def rows(libs: dict[str, Any], labels: int) -> list[dict[str, Any]]:
    """All readings of data sets with so many labels."""
    x, y = torch.randn(SAMPLES, 4), torch.arange(SAMPLES) % labels
    plain, about = Plain(x, y.tolist()), {"samples": SAMPLES, "labels": labels}
    found = []
    for kind, dataset in (("Python", plain), ("TensorDataset", TensorDataset(x, y))):
        calls = {k: lambda lib=lib, d=dataset: lib.MetaDataset(d) for k, lib in libs.items()}
        found.append(row(f"MetaDataset of {kind}", calls, **about))
    books = {name: lib.MetaDataset(plain) for name, lib in libs.items()}
    gc.freeze()  # neither's collections go through the books of both
    half = list(range(0, labels, 2))
    calls = {k: lambda k=k: libs[k].transforms.FilterLabels(books[k], half) for k in libs}
    found.append(row("FilterLabels(dataset, half)", calls, **about))
    steps = {name: chains(lib, books[name]) for name, lib in libs.items()}
    for chain in steps["fastkfo"]:
        tasks = {k: lib.Taskset(books[k], steps[k][chain]) for k, lib in libs.items()}
        if not same(tasks):
            raise SystemExit(f"{chain}: the tasks are not the same")
        found.append(row(f"a task: {chain}", {k: t.sample for k, t in tasks.items()}, **about))
    return found


def main() -> None:
    torch.set_num_threads(1)
    oracle = learn2learn_data()
    how = compiled(oracle)
    sample_sets()
    print(f"learn2learn: {how}", flush=True)
    libs = {"learn2learn": oracle, "fastkfo": fastkfo.data}
    found = [each for labels in (100, 1000) for each in rows(libs, labels)]
    environment = machine.environment("cpu") | {"learn2learn": how}
    write_rows("data", "tasks", environment, found)


if __name__ == "__main__":
    main()
