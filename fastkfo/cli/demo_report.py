"""What the demo prints and stores: one table, and a JSON record."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import fastkfo
from fastkfo._version import __version__
from fastkfo.cli.demo_methods import Run, Settings
from fastkfo.cli.demo_notes import footnotes

__all__ = ["interval", "record", "table", "write_json"]

NOTHING = "-"


def interval(values: torch.Tensor) -> tuple[float, float]:
    """Summarises accuracies of independent tasks.

    Args:
        values: One per task, ``[T]``.

    Returns:
        Mean, and half the width of the 95 % interval (normal approximation; NaN for one task).
    """
    values = values.double()
    half = 1.96 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), half


def table(runs: list[Run], settings: Settings) -> Table:
    """Builds the one table.

    Args:
        runs: All methods, finished or not.
        settings: The demo's options.

    Returns:
        A row for each method.
    """
    title = f"{settings.ways}-way {settings.shots}-shot on digits never seen in training"
    result = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    result.add_column("", no_wrap=True)
    for header in (
        "meta-\niter.",
        "accuracy (%)\nbefore",
        f"\nafter {settings.steps} steps",
        "plain\nms/it.",
        "fastkfo\nms/it.",
        "\nratio",
        "gradient\ndiff.",
    ):
        result.add_column(header, justify="right", no_wrap=True)
    for run in runs:
        accuracies = run.best_known()
        mark = "" if run.test is not None else "†"
        times, ratio, difference = [NOTHING, NOTHING], NOTHING, NOTHING
        if run.differences:
            seconds = (run.reference_seconds, run.fastkfo_seconds)
            times = [f"{1000 * statistics.median(s):.1f}" for s in seconds]
            ratio = f"{_ratio(run):.2f}x"
            difference = f"{_largest(run.differences):.1e}"
        result.add_row(
            run.name + ("‡" if run.failure or run.not_finite else ""),
            str(len(run.losses)),
            NOTHING if accuracies is None else _percent(accuracies[:, 0]) + mark,
            NOTHING if accuracies is None else _percent(accuracies[:, settings.steps]) + mark,
            *times,
            ratio,
            difference,
        )
    # Its own width, whatever the screen's: a line too long wraps, but no digit is cut off.
    measuring = Console(width=1000)
    result.width = measuring.measure(result).maximum
    return result


def record(runs: list[Run], settings: Settings, signal_name: str | None) -> dict[str, Any]:
    """Collects everything that was measured.

    Args:
        runs: All methods, finished or not.
        settings: The demo's options.
        signal_name: The signal that cut the run short, or None.

    Returns:
        Settings, versions, machine and raw numbers, ready for JSON.
    """
    methods = {}
    for run in runs:
        test = None
        if run.test is not None:
            before, after = (interval(run.test[:, i]) for i in (0, settings.steps))
            test = {
                "tasks": len(run.test),
                "accuracy_before": {"mean": before[0], "half_width_95": before[1]},
                "accuracy_after": {"mean": after[0], "half_width_95": after[1]},
                "tasks_not_finite": run.not_finite,
                "accuracies_by_task_and_step": _rounded(run.test),
            }
        timing = None
        if run.differences:
            timing = {
                "unit": "seconds per meta-gradient",
                "reference_median": statistics.median(run.reference_seconds),
                "fastkfo_median": statistics.median(run.fastkfo_seconds),
                "ratio_median": _ratio(run),
                "reference": run.reference_seconds,
                "fastkfo": run.fastkfo_seconds,
            }
        methods[run.name] = {
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "parameters_with_transform": sum(p.numel() for p in run.learner.parameters()),
            "iterations": len(run.losses),
            "failure": run.failure,
            "losses": run.losses,
            "validation": [
                {"iteration": iteration, "accuracies_by_task_and_step": _rounded(values)}
                for iteration, values in run.curve
            ],
            "test": test,
            "timing": timing,
            "meta_gradient_difference": {
                "measure": "largest |fastkfo - reference| / |reference| (2-norms) of all tensors",
                "dtype": "float32",
                "largest": _largest(run.differences) if run.differences else None,
                "by_round": run.differences,
            },
        }
    backends = getattr(fastkfo, "backends", None)
    return {
        "settings": asdict(settings) | {"out": str(settings.out)},
        "interrupted_by": signal_name,
        "versions": {
            "fastkfo": __version__,
            "python": platform.python_version(),
            **{n: version(n) for n in ("torch", "numpy", "scikit-learn", "matplotlib")},
        },
        "machine": {
            "platform": platform.platform(),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "backends": None if backends is None else str(backends()),
        "methods": methods,
        "notes": footnotes(runs, settings, signal_name),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a record as strict JSON; numbers that are not finite become null.

    Args:
        path: The file.
        content: What :func:`record` returned.
    """
    text = json.dumps(_finite(content), indent=1, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _percent(values: torch.Tensor) -> str:
    mean, half = interval(values)
    return f"{100 * mean:.1f} ± " + (NOTHING if math.isnan(half) else f"{100 * half:.1f}")


def _ratio(run: Run) -> float:
    pairs = zip(run.reference_seconds, run.fastkfo_seconds, strict=True)
    return statistics.median(reference / ours for reference, ours in pairs)


def _largest(values: list[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


def _rounded(values: torch.Tensor) -> list[list[float]]:
    return [[round(v, 4) for v in row] for row in values.tolist()]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
