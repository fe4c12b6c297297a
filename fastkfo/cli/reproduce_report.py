"""What `fastkfo reproduce` writes: a short report, and a record of everything."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fastkfo._version import __version__
from fastkfo.cli.reproduce_jobs import Done
from fastkfo.cli.reproduce_problems import DEPTH, LARGEST_OVER_SMALLEST, Problem
from fastkfo.cli.reproduce_rows import Row, as_markdown
from fastkfo.cli.reproduce_surface import Surface
from fastkfo.cli.reproduce_training import CLIP, Examined

__all__ = ["FIGURES", "record", "report"]

FIGURES = {
    "reproduce-regression.png": "Linear regression: inputs of unequal and of equal scale.",
    "reproduce-classification.png": "Binary classification, likewise.",
    "reproduce-surface.png": "y = a b x: the meta-loss and MAML's way on it; what the learned "
    "(a, b) does on four tasks; one step at every rate.",
    "reproduce-digits.png": "Digits, on the digits of training and on others.",
}


def report(problems: Sequence[Problem], found: Sequence[Row], about: dict[str, Any]) -> str:
    """The short report.

    Args:
        problems: Which.
        found: The rows.
        about: Of the run: ``seeds``, ``quick``, ``wall_seconds``, ``cpu_seconds``, ``processes``.

    Returns:
        Markdown.
    """
    figures = "\n\n".join(f"![{text}]({name})\n\n{text}" for name, text in FIGURES.items())
    warning = "**A quick run: no number means anything.**\n\n"
    settings = "\n".join(_settings(problem) for problem in problems)
    return f"""# MAML on shallow and deep linear models, and Meta-KFO

{warning if about["quick"] else ""}After Arnold, Iqbal, Sha, "When MAML Can Adapt Fast and How to
Assist When It Cannot", AISTATS 2021. The settings of its illustrative figures are not published:
these are fastkfo's own, so no number here is to be compared with one of theirs.

{as_markdown(problems, found)}
{_over(about["seeds"])}; all methods
have the same tasks. "Before" and "after" K inner steps, on test tasks; "minus the first" is the
difference from the first method of its group, seed by seed. The inner rate of every method is
chosen for each seed among the same rates by the score on validation tasks: median, and lowest to
highest where seeds differ. In the figures, a hollow marker at the edge is a mean that is off the
axis, or not finite.

{figures}

## Settings

Linear models: W x for regression, W x + b for classification. Deep and LinNet: a product of
{DEPTH} layers of the width of x, as nn.Linear draws them. KFO:
KroneckerTransform(KroneckerLinear), psd, not adapted. Unequal scales: the largest of the inputs'
standard deviations is {LARGEST_OVER_SMALLEST:g} times the smallest, their mean square is 1, and
each input adds as much to y as any other. All: second-order MAML, Adam whose rate falls to zero
along a half cosine, meta-gradients cut at norm {CLIP:g}, float32.

{settings}

fastkfo {__version__}, torch {version("torch")}, Python {platform.python_version()};
{about["cpu_seconds"]:.0f} s of processor time, {about["wall_seconds"]:.0f} s in
{about["processes"]} process{"es" if about["processes"] > 1 else ""}.
"""


def _over(seeds: int) -> str:
    if seeds == 1:
        return "From one seed of weights and tasks, and so without an interval"
    return f"Mean and 95 % interval (Student's t) over {seeds} seeds of weights and tasks"


def _settings(p: Problem) -> str:
    return (
        f"- **{p.title}**: {p.inputs} inputs, {p.outputs} output{'s' * (p.outputs > 1)}, "
        f"{p.shots} + {p.queries} points{' per class' * p.accuracy}, K = {p.steps}, "
        f"rates {', '.join(f'{r:g}' for r in p.rates)}; {p.iterations} iterations of "
        f"{p.meta_batch} tasks, Adam {p.meta_lr:g}; {p.validation_tasks} validation and "
        f"{p.test_tasks} test tasks."
    )


def record(
    problems: Sequence[Problem],
    done: Sequence[Done],
    found: Sequence[Row],
    drawn: Surface,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Collects everything that was measured.

    Args:
        problems: Which.
        done: What was reached.
        found: The rows.
        drawn: The surface.
        about: Of the run.

    Returns:
        What `write_json` takes; numbers have six digits.
    """
    versions = {n: version(n) for n in ("torch", "numpy", "scikit-learn")}
    content = {
        "about": about,
        "versions": {"fastkfo": __version__, "python": platform.python_version(), **versions},
        "problems": [asdict(p) for p in problems],
        "rows": [asdict(row) for row in found],
        "runs": [_short(e) for d in done for e in d.examined],
        "surface": asdict(drawn),
    }
    return _rounded(content)


def _short(e: Examined) -> dict[str, Any]:
    """One method from one seed, without the accuracies that there are not."""
    return {
        "problem": e.problem, "exam": e.exam, "method": e.method, "seed": e.seed,
        "chosen": e.chosen,
        "rates": [
            [m.rate, m.skipped, m.validation.score, m.test.score, m.test.loss] for m in e.rates
        ],
        "rates_are": "rate, skipped, validation score, test score, test loss",
        "curve": [c.score for c in e.curve],
        "curve_loss": [c.loss for c in e.curve],
    }  # fmt: skip


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
