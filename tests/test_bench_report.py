"""What is made of records: merged runs, tables, the README."""

from pathlib import Path

import pytest

from bench import kernel_cases, kernels, launches, machine, report, summary, table
from bench.problem import Problem
from bench.records import load
from tests.bench_rows import RATES, made_up, made_up_runs

pytestmark = pytest.mark.slow  # not once more on the reference: no kernel is called

ROOT = Path(__file__).resolve().parent.parent


def test_spread_over_runs():
    (row,) = summary.merged(made_up_runs())
    ours = row["peers"]["fastkfo"]
    assert ours["runs"] == 3
    assert (ours["lowest"], ours["speedup"], ours["highest"]) == (2.0, 2.5, 4.0)
    assert "speedup" not in row["peers"]["vmap"]
    assert row["peers"]["jax"] == {"status": "missing", "why": "jax is not installed"}


def test_one_wrong_run_is_wrong():
    runs = made_up_runs()
    bad = runs[1]["rows"][0]["peers"]
    bad["fastkfo"] = dict(bad["vmap"])
    (row,) = summary.merged(runs)
    assert row["peers"]["fastkfo"]["status"] == "wrong"
    assert "speedup" not in row["peers"]["fastkfo"]


def test_table_says_who_is_wrong_and_who_is_missing():
    quoted = report.quoted(made_up_runs())
    assert "4.00 ms, **2.50x (2.00-4.00)**" in quoted
    assert "wrong by 0.10 % (2.00 ms)" in quoted
    assert "| missing |" in quoted
    page = report.page("machine", {"name": made_up_runs()})
    assert "missing: jax is not installed" in page
    assert "wrong by 1e-03, w by 4e+00" in page


def test_one_run_has_no_spread():
    quoted = report.quoted(made_up_runs()[:1])
    assert "**2.00x (one run)**" in quoted
    runs = made_up_runs()
    runs[0]["complete"] = False
    assert "## name (cut short)" in report.page("machine", {"name": runs})


def test_one_unstable_run_is_said_and_the_spread_with_it():
    runs = made_up_runs()
    runs[1]["rows"][0]["peers"]["fastkfo"]["speedup"]["unstable"] = True
    assert "**~2.50x (2.00-4.00, unstable)**" in report.quoted(runs)


def test_other_sizes_are_named():
    problem = Problem.named("anil-head", "kfo", width=32)
    runs = made_up_runs()
    runs[0]["rows"].append(made_up(problem) | {"dtype": "float64"})
    assert "`anil-head` T 16, K 5, width 32, float64" in report.quoted(runs)


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (312.4, "312"), (41.23, "41.2"), (2.104, "2.10"),
                        (0.0123, "0.012"), (1e-9, "<0.0001"), (0, "0.00"), (12345.6, "12,346")]
)  # fmt: skip
def test_numbers_have_no_exponent(value, text):
    assert table.number(value) == text


def test_narrow_terminals_have_fewer_columns():
    rows = made_up_runs()[0]["rows"]
    assert len(table.problems(rows, 200).columns) == len(table.COLUMNS)
    assert len(table.problems(rows, 80).columns) == 4


def test_readme_is_what_the_records_say():
    """One command makes the README's table; nobody edits it."""
    text = (ROOT / "README.md").read_text()
    inside = text.split(report.BEGIN)[1].split(report.END)[0].strip()
    quoting = list((ROOT / "bench/results").glob(f"*/{report.README}.json"))
    assert inside in [report.quoted(load(path)).strip() for path in quoting]


def test_page_of_kernels_and_launches():
    about = {"environment": machine.environment("cpu"), "complete": True}
    case = kernel_cases.large(16)
    kernel = kernels.read(case, RATES, "cpu", 0.0)
    kernel["implementations"]["native"] |= {"us": 12.0, "times_floor": 4.0, "how": "events"}
    launched = launches.read(Problem.named("anil-head", "kfo", tasks=2, steps=1, width=8))
    launched["graph"] = launches.nodes([("mm", 1e-6)] * 4193, 16e-3)
    failed = launched | {"why": "RuntimeError: no", "launched": {}, "graph": None}
    records = {
        "kernels": [{**about, "ceilings": RATES, "rows": [kernel]}],
        "launches": [{**about, "rows": [launched, failed]}],
    }
    page = report.page("machine", records)
    assert "| `large factors` | 16 x 16 | forward |" in page
    assert "| 12.0 (4.00, by events) | missing |" in page
    assert "4,193, 16.0 | 3.82 |" in page
    assert "RuntimeError: no" in page
    assert page.count("Ceilings of the last") == 1
