"""How Sphinx makes these pages: `make docs`.

Every page reads on GitHub as it is. Nothing is fetched, and no notebook is run: its stored outputs
are shown, which tests/test_notebook.py compares with what its cells give.
"""

import importlib
import pydoc
import re
import sys
from pathlib import Path
from types import ModuleType

from sphinx.util import logging

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

project = "fastkfo"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "fastkfo"
nb_execution_mode = "off"
myst_heading_anchors = 4  # as GitHub makes them
highlight_language = "none"  # of blocks that name none: formulas

# Docstrings are in Google's style, with single backticks around code.
default_role = "literal"
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Source"]

AUTOMODULE = re.compile(r"^\.\. automodule:: (\S+)", re.M)
OUTSIDE = re.compile(r"\]\(((?:\.\./)+[^)#]*)(#[^)]*)?\)")
warn = logging.getLogger(__name__).warning


def reach_outside(app, page, source):
    """Links to files outside of docs/ become downloads; those to folders become plain words."""
    folder = Path(app.env.doc2path(page)).parent

    def replaced(match):
        target = (folder / match[1]).resolve()
        if target.is_relative_to(DOCS):
            return match[0]
        return f"](path:{match[1]})" if target.is_file() else "]"

    if not page.endswith("tour"):
        source[0] = OUTSIDE.sub(replaced, source[0])


def add_modules(app, page, source):
    """A module that a package's `__all__` names, and no page does, gets a section of its own."""
    if not page.startswith("api/"):
        return
    written = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.rst"))
    for package in map(importlib.import_module, AUTOMODULE.findall(source[0])):
        for name in package.__all__:
            module = getattr(package, name)
            if isinstance(module, ModuleType) and module.__name__ not in written:
                twice = [n for n in module.__all__ if n in package.__all__]
                title = f"\n{module.__name__}\n{'-' * len(module.__name__)}\n"
                source[0] += f"{title}\n.. automodule:: {module.__name__}\n"
                source[0] += f"   :exclude-members: {', '.join(twice)}\n" if twice else ""


def without_aliases(app, what, name, thing, skip, options):
    """Fields of a named tuple are described under its attributes already."""
    return True if type(thing).__name__ == "_tuplegetter" else None


def complete(app, env):
    """Every name in the `__all__` of a module on an API page must have come out on one."""
    described = {name for name, *_ in env.domains["py"].get_objects()}
    things = {id(thing) for thing in map(pydoc.locate, described) if callable(thing)}
    for page in sorted((DOCS / "api").glob("*.rst")):
        for name in AUTOMODULE.findall(page.read_text()):
            module = importlib.import_module(name)
            for public in module.__all__:
                thing = getattr(module, public)
                known = f"{name}.{public}" in described or id(thing) in things
                if not known and not isinstance(thing, ModuleType):
                    warn(f"{page.name}: {name}.{public} is public, and not described")


def setup(app):
    """Sphinx calls this."""
    app.connect("source-read", reach_outside)
    app.connect("source-read", add_modules)
    app.connect("autodoc-skip-member", without_aliases)
    app.connect("env-check-consistency", complete)
