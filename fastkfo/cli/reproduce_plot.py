"""The figures of `fastkfo reproduce`: adaptation, the score at every rate, the loss surface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from fastkfo.cli.reproduce_jobs import Done
from fastkfo.cli.reproduce_problems import Problem
from fastkfo.cli.reproduce_rows import spread
from fastkfo.cli.reproduce_surface import Surface, meta_loss
from fastkfo.cli.reproduce_training import Examined

__all__ = ["write_figures"]

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers for print.
STYLES = {
    "shallow": ("#0072B2", "o"), "linnet": ("#D55E00", "s"), "kfo": ("#009E73", "^"),
    "mlp": ("#CC79A7", "D"),
}  # fmt: skip
TASK_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7")
GREY = "#666666"
DPI = 90
#: Ends of the vertical axis, in units of the score.
RANGES = {"regression": (0.002, 2.0), "classification": (0.45, 1.0), "digits": (0.6, 1.0)}


def write_figures(
    out: Path, problems: Sequence[Problem], done: Sequence[Done], drawn: Surface
) -> None:
    """Draws the four figures.

    Args:
        out: The folder.
        problems: Which.
        done: What was reached.
        drawn: The surface.
    """
    examined = [e for d in done for e in d.examined]
    by_name = {p.name: p for p in problems}
    for name in ("regression", "classification"):
        pair = [by_name[name], by_name[f"{name}-equal"]]
        columns = [(p, p.exams[0][0], p.title) for p in pair]
        _families(out / f"reproduce-{name}.png", columns, examined)
    digits = by_name["digits"]
    columns = [(digits, exam, f"{digits.title}: {title}") for exam, title in digits.exams]
    _families(out / "reproduce-digits.png", columns, examined)
    _surface(out / "reproduce-surface.png", by_name["line"], examined, drawn)


def _families(
    path: Path, columns: list[tuple[Problem, str, str]], examined: list[Examined]
) -> None:
    """A column per exam; above, every step at the chosen rate, below, step K at every rate."""
    figure = Figure(figsize=(9.5, 7.2), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(columns), sharey="row")
    for column, (problem, exam, title) in enumerate(columns):
        own = [e for e in examined if (e.problem, e.exam) == (problem.name, exam)]
        _adaptation(axes[0][column], problem, own)
        axes[0][column].set_title(title, fontsize=10)
        _rates(axes[1][column], problem, own)
    problem = columns[0][0]
    score = "test accuracy (%)" if problem.accuracy else "test squared error"
    for row, text in ((0, "at the rate that validation chose"), (1, "after K steps")):
        axes[row][0].set_ylabel(f"{score}\n{text}")
    axes[0][0].legend(frameon=False, fontsize=9)
    figure.savefig(path)


def _range(axes: Axes, problem: Problem) -> tuple[float, float]:
    """Sets the vertical axis, and returns its ends in units of the score."""
    low, top = RANGES.get(problem.name.partition("-")[0], (0.1, 2.0))
    factor = 100 if problem.accuracy else 1
    if not problem.accuracy:
        axes.set_yscale("log")
        ticks = [
            t for t in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0) if low <= t <= top
        ]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(factor * low, factor * top)
    return low, top


def _adaptation(axes: Axes, problem: Problem, own: list[Examined]) -> None:
    for kind, label in problem.methods:
        curves = [e.curve for e in own if e.method == label]
        if curves:
            steps = range(len(curves[0]))
            points = [(k, *spread(curve[k].score for curve in curves)) for k in steps]
            _draw(axes, problem, points, kind, label)
    axes.axvline(problem.steps, color=GREY, linewidth=0.8, linestyle=":")
    axes.annotate(
        "K of training", (problem.steps, 0), xycoords=("data", "axes fraction"), xytext=(4, 6),
        textcoords="offset points", fontsize=8, color=GREY,
    )  # fmt: skip
    _range(axes, problem)
    axes.set_xlabel("inner steps")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes)


def _rates(axes: Axes, problem: Problem, own: list[Examined]) -> None:
    """Means that are off the axis, or not finite, are hollow markers at its top or bottom."""
    low, top = _range(axes, problem)
    for kind, label in problem.methods:
        runs = [e for e in own if e.method == label]
        if not runs:
            continue
        points = [
            (rate, *spread(e.rates[index].test.score for e in runs))
            for index, rate in enumerate(problem.rates)
        ]
        lost = [p[0] for p in points if not low <= p[1] <= top]
        points = [p for p in points if p[0] not in lost]
        _draw(axes, problem, points, kind, label)
        color, marker = STYLES[kind]
        axes.plot(
            lost, [0.02 if problem.accuracy else 0.98] * len(lost), color=color, marker=marker,
            transform=axes.get_xaxis_transform(), markerfacecolor="white", linestyle="",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(problem.rates), [f"{r:g}" for r in problem.rates])
    axes.set_xlabel("inner learning rate")
    _finish(axes)


def _draw(
    axes: Axes,
    problem: Problem,
    points: Sequence[tuple[float, float, float]],
    kind: str,
    label: str,
) -> None:
    """Means with their 95 % band; points are (x, mean, half width)."""
    factor = 100 if problem.accuracy else 1
    color, marker = STYLES[kind]
    x = [p[0] for p in points]
    mean = torch.tensor([factor * p[1] for p in points], dtype=torch.float64)
    half = torch.tensor([factor * p[2] for p in points], dtype=torch.float64).nan_to_num(0.0)
    low = mean - half if problem.accuracy else (mean - half).clamp_min(1e-9)  # of a log axis
    axes.plot(x, mean, color=color, marker=marker, markersize=4, linewidth=1.5, label=label)
    axes.fill_between(x, low, mean + half, color=color, alpha=0.15, linewidth=0)


def _finish(axes: Axes) -> None:
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _surface(path: Path, problem: Problem, examined: list[Examined], drawn: Surface) -> None:
    figure = Figure(figsize=(13.0, 4.3), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    _contours(left, lambda point: meta_loss(point, drawn.rate), figure)
    x, y = zip(*drawn.path, strict=True)
    left.plot(x, y, color="black", linewidth=1.5, label="training, seed 0")
    left.plot(x[:1], y[:1], "o", color="black", markerfacecolor="white", markersize=6)
    ends = list(zip(*drawn.ends, strict=True))
    left.plot(ends[0], ends[1], "*", color="#D55E00", markersize=11, label="learned, every seed")
    left.set_title(f"Meta-loss of y = a b x: one step of rate {drawn.rate:g}", fontsize=10)
    left.legend(loc="upper right", fontsize=8)
    _contours(middle, lambda point: (point.prod(-1) - drawn.tasks[-1]).square(), figure)
    for w, color, steps in zip(drawn.tasks, TASK_COLORS, drawn.adaptations, strict=True):
        _task(middle, w, color, steps)
    middle.set_title(
        f"Loss of the task w = {drawn.tasks[-1]:g}; steps from seed 0's (a, b)", fontsize=10
    )
    middle.legend(loc="upper right", fontsize=8)
    for axes in (left, middle):
        axes.set_xlabel("a")
        axes.set_ylabel("b")
    own = [e for e in examined if e.problem == problem.name]
    _rates(right, problem, own)
    right.axvline(drawn.rate, color=GREY, linewidth=0.8, linestyle=":")
    right.set_ylabel("test squared error after one step")
    right.set_title("One step on y = w x, at every rate", fontsize=10)
    right.legend(frameon=False, fontsize=9)
    figure.savefig(path)


LIMIT = 3.2


def _contours(axes: Axes, function: Any, figure: Figure) -> None:
    line = torch.linspace(-LIMIT, LIMIT, 161, dtype=torch.float64)
    b, a = torch.meshgrid(line, line, indexing="ij")
    values = function(torch.stack([a, b], -1)).clamp(1e-2, 1e2).log10()
    shown = axes.contourf(a, b, values, levels=[-2 + 0.5 * i for i in range(9)], cmap="Greys")
    bar = figure.colorbar(shown, ax=axes, ticks=[-2, -1, 0, 1, 2], shrink=0.8)
    bar.ax.set_yticklabels(["≤ 0.01", "0.1", "1", "10", "≥ 100"], fontsize=8)
    axes.set_aspect("equal")
    axes.set_xlim(-LIMIT, LIMIT)
    axes.set_ylim(-LIMIT, LIMIT)


def _task(axes: Axes, w: float, color: str, steps: list[list[float]]) -> None:
    """A task's solutions a b = w, and the way there."""
    a = torch.linspace(abs(w) / LIMIT, LIMIT, 60, dtype=torch.float64)
    for sign in (-1, 1):
        axes.plot(sign * a, sign * w / a, color=color, linewidth=1, linestyle="--")
    x, y = zip(*steps, strict=True)
    axes.plot(x[:2], y[:2], color=color, linewidth=2, label=f"w = {w:g}")
    axes.plot(x[1:], y[1:], color=color, linewidth=1, marker="o", markersize=4)
    axes.plot(x[:1], y[:1], "*", color="#D55E00", markersize=11)
