"""The table of `fastkfo reproduce`: a method's mean over seeds, with its interval."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.table import Table

from fastkfo.cli.reproduce_jobs import Done
from fastkfo.cli.reproduce_problems import Problem
from fastkfo.cli.reproduce_training import Examined

__all__ = ["Row", "as_csv", "as_markdown", "rows", "spread", "tables"]

# Student's t, two-sided 95 %, for 1 to 19 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
)  # fmt: skip


def spread(values: Iterable[float]) -> tuple[float, float]:
    """Summarises one value per seed.

    Args:
        values: n of them.

    Returns:
        The mean, and half the width of its 95 % interval, t s / √n with Student's t (1.96 from
        n = 21 on); NaN for n = 1.
    """
    x = torch.tensor(list(values), dtype=torch.float64)
    n = len(x)
    if n < 2:
        return x.mean().item(), math.nan
    t = _T[n - 2] if n - 2 < len(_T) else 1.96
    return x.mean().item(), t * x.std().item() / math.sqrt(n)


@dataclass(frozen=True)
class Row:
    """One method on one exam, at the rate that its validation chose for each seed.

    Attributes:
        problem: Its name.
        exam: Its name.
        method: Its label.
        score: "accuracy" or "mse".
        seeds: How many.
        before: Mean and half width of the test score before adaptation.
        after: After K steps.
        difference: From the first method's, seed by seed; None for the first.
        loss: Query loss after K steps.
        rates: Lowest, median (the upper of two) and highest rate that was chosen.
        skipped: Meta-iterations whose gradient was not finite, at the chosen rates.
    """

    problem: str
    exam: str
    method: str
    score: str
    seeds: int
    before: tuple[float, float]
    after: tuple[float, float]
    difference: tuple[float, float] | None
    loss: tuple[float, float]
    rates: tuple[float, float, float]
    skipped: int


def rows(problems: Sequence[Problem], done: Sequence[Done]) -> list[Row]:
    """Summarises over seeds.

    Args:
        problems: Which.
        done: What was reached.

    Returns:
        In the order of problems, exams and methods.
    """
    examined = [e for d in done for e in d.examined]
    found = []
    for problem in problems:
        for exam, _ in problem.exams:
            first: list[Examined] = []
            for _, method in problem.methods:
                own = [
                    e
                    for e in examined
                    if (e.problem, e.exam, e.method) == (problem.name, exam, method)
                ]
                if own:
                    found.append(_row(problem, own, first))
                    first = first or own
    return found


def _row(problem: Problem, own: list[Examined], first: list[Examined]) -> Row:
    rates = sorted(e.chosen for e in own)
    pairs = {e.seed: e.test.score for e in first}
    return Row(
        problem.name,
        own[0].exam,
        own[0].method,
        "accuracy" if problem.accuracy else "mse",
        len(own),
        spread(e.curve[0].score for e in own),
        spread(e.test.score for e in own),
        spread(e.test.score - pairs[e.seed] for e in own if e.seed in pairs) if first else None,
        spread(e.test.loss for e in own),
        (rates[0], rates[len(rates) // 2], rates[-1]),
        sum(m.skipped for e in own for m in e.rates if m.rate == e.chosen),
    )


def tables(problems: Sequence[Problem], found: Sequence[Row]) -> list[Table]:
    """Builds the tables for a terminal.

    Args:
        problems: Which.
        found: The rows.

    Returns:
        One per exam.
    """
    shown: dict[str, Table] = {}
    for row in found:
        title = _title(problems, row)
        if title not in shown:
            shown[title] = _table(title)
        shown[title].add_row(row.method, *_cells(row))
    return list(shown.values())


def _table(title: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0), show_edge=False,
    )  # fmt: skip
    table.add_column("", min_width=16, no_wrap=True)
    for header in ("before", "after", "minus the first"):
        table.add_column(header, justify="right", min_width=14, no_wrap=True)
    table.add_column("inner rate", overflow="fold")
    return table


def as_csv(found: Sequence[Row]) -> str:
    """The rows as CSV, a column per number.

    Args:
        found: The rows.

    Returns:
        The text, with a header.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    pairs = ("before", "after", "difference", "loss")
    writer.writerow(
        [
            "problem", "exam", "method", "score", "seeds",
            *[name for pair in pairs for name in (pair, f"{pair}_half_width_95")],
            "rate_lowest", "rate_median", "rate_highest", "skipped",
        ]
    )  # fmt: skip
    for row in found:
        numbers = [x for pair in pairs for x in (getattr(row, pair) or ("", ""))]
        numbers = ["" if x != x else x for x in numbers]  # NaN: one seed has no interval
        writer.writerow(
            [row.problem, row.exam, row.method, row.score, row.seeds]
            + [f"{x:.6g}" if isinstance(x, float) else x for x in [*numbers, *row.rates]]
            + [row.skipped]
        )
    return text.getvalue()


def as_markdown(problems: Sequence[Problem], found: Sequence[Row]) -> str:
    """The rows as a table in Markdown.

    Args:
        problems: Which.
        found: The rows.

    Returns:
        The text.
    """
    lines = ["| tasks | method | before | after | minus the first | inner rate |"]
    lines.append("|---|---|---|---|---|---|")
    heading = ""
    for row in found:
        title = _title(problems, row)
        lines.append(
            f"| {title if title != heading else ''} | {row.method} | {' | '.join(_cells(row))} |"
        )
        heading = title
    return "\n".join(lines) + "\n"


def _title(problems: Sequence[Problem], row: Row) -> str:
    problem = next(p for p in problems if p.name == row.problem)
    title = problem.title
    if len(problem.exams) > 1:
        title += f": {dict(problem.exams)[row.exam]}"
    return f"{title} ({'accuracy, %' if problem.accuracy else 'squared error'})"


def _cells(row: Row) -> list[str]:
    def show(pair: tuple[float, float] | None) -> str:
        if pair is None:
            return ""
        factor, digits = (100, 1) if row.score == "accuracy" else (1, 3)
        mean, half = (round(factor * x, digits) + 0.0 for x in pair)  # + 0.0: no -0.0
        if mean >= 1e4:
            return f"{mean:.1e}"
        interval = "" if math.isnan(half) else f" ± {half:.{digits}f}"  # of one seed there is none
        return f"{mean:.{digits}f}{interval}"

    low, median, high = row.rates
    rate = f"{median:g}" + (f" ({low:g}-{high:g})" if low < high else "")
    return [show(row.before), show(row.after), show(row.difference), rate]
