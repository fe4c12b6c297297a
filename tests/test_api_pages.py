"""Every public name is on a page of docs/api/.

`make docs` checks the same of what Sphinx has made of these pages. A module that a package's
`__all__` names, and no page does, gets a section of its own then (docs/conf.py).
"""

import ast
import importlib
import re
from types import ModuleType

import pytest

from tests.documents import ROOT

pytestmark = pytest.mark.slow  # not once more on the reference
PAGES = "\n".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.rst")))
PUBLIC = [
    "fastkfo", "fastkfo.algorithms", "fastkfo.data", "fastkfo.functional", "fastkfo.inner_loop",
    "fastkfo.nn", "fastkfo.optim", "fastkfo.tasks", "fastkfo.training", "fastkfo.utils",
    "fastkfo.vision",
]  # fmt: skip

# "steps: K." is an empty item of a list to reStructuredText: nothing of it comes out on the page.
LISTED = re.compile(
    r"^ *(?:\*{0,2}\w+(?: \([^)]*\))?: |(?:Returns|Yields):\n +)"
    r"\(?(?:[A-Za-z]|[ivxlcdm]+|[IVXLCDM]+|\d+|#)[.)](?=\s|$)",
    re.M,
)


def automodules():
    """Modules whose names autodoc writes out, and which of these it leaves out."""
    for name, options in re.findall(r"^\.\. automodule:: (\S+)\n((?: +:.*\n)*)", PAGES, re.M):
        if ":no-members:" not in options:
            excluded = re.search(r":exclude-members: (.*)", options)
            yield name, set(excluded[1].split(", ")) if excluded else set()


def written_out():
    """What autodoc writes out: by name, and by what it is."""
    names, things = set(), set()
    for name, excluded in automodules():
        module = importlib.import_module(name)
        for public in set(module.__all__) - excluded:
            thing = getattr(module, public)
            if callable(thing) and isinstance(getattr(thing, "__name__", None), str):
                names.add(f"{name}.{public}")
                things.add(id(thing))
    return names, things


def with_submodules(names):
    """Public modules, and those that their `__all__` and a page name."""
    for name in names:
        module = importlib.import_module(name)
        yield name
        inner = [n for n in module.__all__ if isinstance(getattr(module, n), ModuleType)]
        further = [f"{name}.{n}" for n in inner]
        yield from with_submodules([n for n in further if n not in PUBLIC and n in PAGES])


@pytest.mark.parametrize("name", list(with_submodules(PUBLIC)))
def test_every_public_name_has_a_place(name):
    module = importlib.import_module(name)
    names, things = written_out()
    by_hand = re.findall(r"^\.\. py:\w+:: (\w+)", PAGES, re.M)
    missing = [
        public
        for public in module.__all__
        if f"{name}.{public}" not in names
        and id(getattr(module, public)) not in things
        and not re.search(rf"\b{re.escape(name)}\.{public}\b", PAGES)
        and public not in by_hand
        and not isinstance(getattr(module, public), ModuleType)
    ]
    assert not missing, f"public in {name}, and on no page of docs/api/: {missing}"


def test_every_public_module_is_listed():
    """A new folder with an `__all__` is public, or says here that it is not."""
    private = {"fastkfo.cli", "fastkfo.kernels", "fastkfo.reference"}
    folders = {f"fastkfo.{p.parent.name}" for p in (ROOT / "fastkfo").glob("*/__init__.py")}
    assert folders - private == set(PUBLIC) - {"fastkfo"}


def docstrings():
    """Every docstring of the package, and where it stands."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for path in sorted((ROOT / "fastkfo").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                name = getattr(node, "name", "the module")
                yield f"{path.relative_to(ROOT)}, {name}", text


def test_no_description_is_read_as_a_list():
    lost = [(place, m[0].strip()) for place, text in docstrings() for m in LISTED.finditer(text)]
    assert not lost, f"descriptions that begin like an item of a list: {lost}"


@pytest.mark.parametrize(
    "text", ["steps: K.", "  n (int): 3. of", "Returns:\n    a) or b", "x: (i) y"]
)
def test_descriptions_like_lists_are_seen(text):
    assert LISTED.search(text)
    assert not LISTED.search("steps: K, the number of steps.\nReturns:\n    The K. of it")
