"""Code blocks of README, CONTRIBUTING and docs/: what is Python runs, what is a command exists.

Python blocks of a page run in order, in one namespace, in an empty folder. tests/documents.py has
the comments by which a block says that it is an excerpt, or cannot run.
"""

import importlib.util
import re
import shlex

import pytest

from tests import documents
from tests.documents import PAGES, ROOT, Block, blocks, name_of

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

pytestmark = pytest.mark.slow  # not once more on the reference: kernels have tests of their own

BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELLS = ("bash", "sh")
LANGUAGES = {"python", *SHELLS, "text", "toml", "yaml", "cpp", "{toctree}"}
AT_MOST_SKIPPED = 4
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M)


def runnable(page):
    return [b for b in blocks(page) if b.language == "python" and not b.note]


def commands(block):
    """The lines of a shell block as words: comments and leading assignments left out."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if words:
            yield words


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder to run in, and a home with a small CIFAR-FS under ~/data."""
    pytest.importorskip("PIL")
    from tests import images

    images.cifarfs(tmp_path / "home" / "data")
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=name_of)
def test_python_runs(page, elsewhere):
    pytest.importorskip("sklearn")
    found = {"__name__": "__main__"}
    for block in runnable(page):
        lines_before = "\n" * (block.line - 1)  # so that a traceback names the page's line
        exec(compile(lines_before + block.text, page, "exec"), found)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.note == "from"], ids=lambda b: b.place)
def test_excerpts_are_what_the_files_say(block):
    """Up to indentation and line breaks, which the formatter chooses."""
    text, excerpt = ("".join(x.split()) for x in ((ROOT / block.about).read_text(), block.text))
    assert excerpt in text, f"{block.place}: not in {block.about}"


@pytest.mark.parametrize(
    ("place", "words"),
    [(b.place, w) for b in BLOCKS if b.language in SHELLS and not b.note for w in commands(b)],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_commands_exist(place, words):
    check(words)


def check(words):
    """A command of this repository, and what it is given, exist."""
    known = {"fastkfo": fastkfo, "make": make, "python": python, "pip": pip, "pytest": pytest_}
    known[words[0]](*words[1:])


def fastkfo(name, *options):
    """The command and its options exist, as its own parser reads them."""
    typer = pytest.importorskip("typer")
    from fastkfo.cli.app import app

    command = typer.main.get_command(app).commands[name]
    if name == "bench":  # whose options are those of another program
        from bench.__main__ import bench

        program = typer.Typer()
        program.command()(bench)
        command = typer.main.get_command(program)
    command.make_context(name, list(options))


def make(*words):
    targets = [w for w in words if "=" not in w]
    assert targets
    assert set(targets) <= set(TARGETS)


def python(first, *rest):
    """A module of the repository, or a file of it."""
    if first == "-m":
        assert importlib.util.find_spec(rest[0])
    else:
        assert (ROOT / first).is_file()


def pytest_(*words):
    assert all((ROOT / w).exists() for w in words if not w.startswith("-"))


def pip(*words):
    """Extras of this package exist."""
    assert words[0] == "install"
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(EXTRAS)


def test_config_files_can_be_read():
    for block in BLOCKS:
        if block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "yaml":
            pytest.importorskip("yaml").safe_load(block.text)


def test_every_block_says_what_it_is():
    strange = [b.place for b in BLOCKS if b.language not in LANGUAGES]
    assert not strange, f"blocks without a language, or with an unknown one: {strange}"
    indented = [name_of(p) for p in PAGES if re.search(r"^ +(```|~~~)", p.read_text(), re.M)]
    assert not indented, f"blocks that are indented, where this test does not look: {indented}"


def test_hardly_a_block_is_skipped():
    skipped = [b for b in BLOCKS if b.note == "skip"]
    assert len(skipped) <= AT_MOST_SKIPPED, [b.place for b in skipped]
    for block in skipped:
        print(f"{block.place}: {block.about}")


@pytest.mark.parametrize("line", [
    "fastkfo trian", "fastkfo train --iteration 3", "fastkfo bench --tasks many", "make tests",
    "python -m bench.nothing", "python bench/nothing.py", "pip install 'fastkfo[trian]'", "rm -r /",
])  # fmt: skip
def test_commands_that_do_not_exist_are_seen(line):
    usage_error = pytest.importorskip("typer").BadParameter.__base__
    errors = (KeyError, AssertionError, ModuleNotFoundError, usage_error)
    with pytest.raises(errors):
        check(shlex.split(line))


def test_blocks_and_what_is_said_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na\n```\n<!-- skip: no GPU -->\n```python\nb\n```\n\n~~~\n```\n~~~\n"
        "<!-- from: setup.py -->\n\n````cpp\n```\n````\ntext\n\n```bash\nmake x  # y\n```\n"
    )
    assert blocks(page) == [
        Block("page.md", 2, "python", "a\n"),
        Block("page.md", 6, "python", "b\n", "skip", "no GPU"),
        Block("page.md", 10, "", "```\n"),
        Block("page.md", 15, "cpp", "```\n", "from", "setup.py"),
        Block("page.md", 20, "bash", "make x  # y\n"),
    ]
