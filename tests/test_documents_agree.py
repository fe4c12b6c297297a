"""What two pages say of one thing, and what a page says of a record, is the same."""

import json
import re
from statistics import mean

import pytest

from tests.documents import LINKING, ROOT, name_of

README = (ROOT / "README.md").read_text()


def words(name):
    return " ".join((ROOT / name).read_text().split())


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_nothing_is_installed_that_is_not_published(page):
    assert "install 'fastkfo[" not in page.read_text()


def test_no_message_says_so():
    for path in (ROOT / "fastkfo").rglob("*.py"):
        assert "install 'fastkfo[" not in path.read_text(), path


def test_ratios_are_those_of_the_readme():
    short = " ".join(README.split())
    small = re.search(r"`InnerLoop` is (\S+ to \S+) times as fast", short)[1]
    convolutional = re.search(r"KFO, (\S+ to \S+) times on convolutional ones", short)[1]
    loop = re.search(r"the unchanged loop (\S+ to \S+) times", short)[1]
    page = words("docs/from_learn2learn.md")
    assert f"{convolutional} on convolutional ones, {small} on small learners" in page
    assert f"once per clone | {loop} |" in page


def test_as_many_runs_as_contributing_says():
    runs = {int(n) for n in re.findall(r"^(\d+) runs on ", README, re.M)}
    assert "from two or three runs" in words("CONTRIBUTING.md")
    assert runs <= {2, 3}


def test_what_is_said_of_kfo_on_digits():
    """docs/reproduce.md, on how much KFO depends on the inner rate."""
    (path,) = ROOT.glob("bench/results/*/reproduce/results.json")
    scores = {}
    for run in json.loads(path.read_text())["runs"]:
        if (run["problem"], run["method"]) == ("digits", "Softmax + KFO"):
            for rate, _, _, test, _ in run["rates"]:
                scores.setdefault((run["exam"], rate), []).append(100 * test)
    unseen = {rate: mean(x) for (exam, rate), x in scores.items() if exam == "unseen"}
    seen = [mean(x) for (exam, _), x in scores.items() if exam == "seen"]
    page = words("docs/reproduce.md")
    assert f"(those of training ({min(seen):.1f} to {max(seen):.1f} %)"[1:] in page
    assert f"{unseen[0.1]:.1f} % at a rate of 0.1 and {unseen[3.2]:.1f} % at 3.2" in page


def test_the_tour_claims_no_more_than_was_run():
    assert "same on any machine" not in words("docs/notebooks/tour.ipynb")
