"""README, CONTRIBUTING and docs/ as tests see them: pages, fenced blocks, headings, links.

A comment on the line before a block says what else it is than code to run:
`<!-- skip: reason -->` or `<!-- from: path -->`, an excerpt of that file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKING = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "bench").rglob("*.md"))]

_FENCE = re.compile(r"^(?P<fence>`{3,}|~{3,})(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=fence)`*$",
                    re.M | re.S)  # fmt: skip
_NOTE = re.compile(r"<!-- (skip|from): ((?:(?!-->).)+) -->\n+\Z", re.S)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_PATH = re.compile(r"`((?:bench|csrc|docs|examples|fastkfo|tests)/[\w./-]*)`")


class Block(NamedTuple):
    """A fenced block: where its text begins, and what the comment before it says."""

    page: str
    line: int
    language: str
    text: str
    note: str = ""
    about: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        note = _NOTE.search(text, 0, match.start())
        kind, about = note.groups() if note else ("", "")
        line = text.count("\n", 0, match.start("text")) + 1
        language = match["language"].strip()
        found.append(Block(name_of(page), line, language, match["text"], kind, about))
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def links(page: Path) -> list[str]:
    """Where a page's links and pictures lead."""
    return _LINK.findall(re.sub(r"`[^`\n]*`", "", re.sub(r"`([^`\n]*)`\]", r"\1]", prose(page))))


def paths(page: Path) -> list[str]:
    """The files and folders of the repository that a page names as code."""
    return _PATH.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """What `#...` may name in a page: its headings, as GitHub writes them."""
    found: dict[str, int] = {}
    slugs = set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", prose(page), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        slugs.add(f"{slug}-{count}" if count else slug)
    return slugs
