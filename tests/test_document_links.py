"""Links between documents, and to files of the repository, lead somewhere."""

from urllib.parse import unquote

import pytest

from tests.documents import LINKING, ROOT, anchors, links, name_of, paths

every_page = pytest.mark.parametrize("page", LINKING, ids=name_of)
pytestmark = pytest.mark.slow  # not once more on the reference


def broken(page, link):
    """Why a link leads nowhere, or None."""
    path, _, anchor = link.partition("#")
    target = (page.parent / unquote(path)).resolve() if path else page
    if not target.is_relative_to(ROOT) or not target.exists():
        return f"{link}: there is no {path}"
    if anchor and target.suffix == ".md" and unquote(anchor) not in anchors(target):
        return f"{link}: {name_of(target)} has {sorted(anchors(target))}"
    return None


@every_page
def test_links_lead_somewhere(page):
    inner = [link for link in links(page) if not link.startswith(("https://", "http://"))]
    assert not [why for link in inner if (why := broken(page, link))]


@every_page
def test_paths_that_are_named_exist(page):
    """`bench/report.py` and the like; a pattern, as in `csrc/cpu/<stem>.cpp`, is none of them."""
    assert not [path for path in paths(page) if not (ROOT / path).exists()]


def test_broken_links_are_seen():
    page = ROOT / "docs" / "inner_loop.md"
    assert broken(page, "kron.md") is None
    assert broken(page, "#what-a-nan-does") is None
    assert broken(page, "training.md#the-run-folder") is None
    assert "there is no" in broken(page, "nothing.md")
    assert "training.md has" in broken(page, "training.md#nothing")
