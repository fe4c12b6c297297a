"""The demo's figure: learning curves and adaptation curves."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastkfo.cli.demo_methods import Run, Settings
from fastkfo.cli.demo_report import interval

__all__ = ["write_plot"]

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers for print.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"))
GREY = "#666666"


def write_plot(path: Path, runs: list[Run], settings: Settings) -> None:
    """Draws what was measured.

    Args:
        path: The PNG file.
        runs: All methods, finished or not.
        settings: The demo's options.
    """
    figure = Figure(figsize=(10.5, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.suptitle(
        f"{settings.ways}-way {settings.shots}-shot on digits never seen in training (scikit-learn "
        "digits, 8x8)",
        fontsize=11,
    )
    for run, (color, marker) in zip(runs, STYLES, strict=True):
        if run.curve:
            points = [(i, *interval(values[:, -1])) for i, values in run.curve]
            _draw(left, points, run.name, color, marker)
        if run.test is not None:
            steps = range(run.test.shape[1])
            points = [(step, *interval(run.test[:, step])) for step in steps]
            _draw(right, points, run.name, color, marker)
    iterations = max(len(run.losses) for run in runs)
    lowest = min((v[:, -1].mean().item() for run in runs for _, v in run.curve), default=0.0)
    left.set_ylim(10 * math.floor(10 * lowest - 0.3), 100)
    right.set_ylim(0, 100)
    _finish(left, settings, bool(runs[0].curve), iterations)
    left.set_title(f"Learning: validation, after {settings.steps} inner steps", fontsize=10)
    left.set_xlabel("meta-iterations")
    left.set_ylabel("accuracy (%)")
    _finish(right, settings, runs[0].test is not None, 2 * settings.steps)
    tested = 0 if runs[0].test is None else len(runs[0].test)
    right.set_title(f"Adaptation: {tested} test tasks, after training", fontsize=10)
    right.set_xlabel("inner steps")
    if tested:
        right.axvline(settings.steps, color=GREY, linewidth=0.8, linestyle=":")
        right.annotate(
            "steps in training",
            (settings.steps, 0.04),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8,
            color=GREY,
        )
    handles, labels = left.get_legend_handles_labels()
    if handles:
        left.legend(handles, labels, loc="lower right", frameon=False, fontsize=9)
    figure.savefig(path)


def _draw(
    axes: Axes, points: list[tuple[int, float, float]], name: str, color: str, marker: str
) -> None:
    """Draws means with their 95 % band; points are (x, mean, half width)."""
    x = [p[0] for p in points]
    mean = 100 * torch.tensor([p[1] for p in points])
    half = 100 * torch.tensor([p[2] for p in points]).nan_to_num(0.0)
    axes.plot(x, mean, color=color, marker=marker, markersize=4, linewidth=1.5, label=name)
    axes.fill_between(x, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)


def _finish(axes: Axes, settings: Settings, has_data: bool, last: int) -> None:
    chance = 100 / settings.ways
    if chance > axes.get_ylim()[0]:
        axes.axhline(chance, color=GREY, linewidth=0.8, linestyle="--")
        axes.annotate(
            "chance",
            (1, chance),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=GREY,
        )
    axes.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not has_data:
        axes.text(
            0.5, 0.5, "not reached", transform=axes.transAxes, ha="center", va="center", color=GREY
        )
