"""learn2learn 0.2.0's `data` as an oracle: its Cython, loaded as Python.

The text of its .pyx files is read from its source when the tests run, without its declarations of
types. `<list>x`, a cast that converts nothing, becomes `list(x)`: what follows, `random.sample` of
a set, is an error on Python 3.11 and newer, and drew from `tuple(x)` before.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
import types

from tests import torchvision_stand_in
from tests.oracle import learn2learn, vision_models

_TYPED = re.compile(r"(?<=[(,])(\s*)(?:list|int|long|bool|dict|object) (?=\w)")


def as_python(text: str) -> str:
    """Leave Cython's declarations out; its classes come first, as they are made first."""
    text = re.sub(
        r"^ *cdef public:\n(?:(?: +[\w\[\]:]+ \w+)?\n)+?(?=\S|^ {0,4}\S)", "", text, flags=re.M
    )
    lines = []
    for line in text.splitlines():
        bare = line.strip()
        if re.match(r"(from \S+ )?cimport |import cython|@cython", bare):
            continue
        if re.fullmatch(r"cdef \w+ \w+", bare):  # a declaration alone
            continue
        if re.match(r"c?p?def (?!class )\w+ ?\w*\(", bare):
            line = re.sub(r"c?p?def (?:\w+ )?(\w+\()", r"def \1", line)
            line = _TYPED.sub(r"\1", line)
        line = re.sub(r"^( +)cdef \w+ (\w+ = )", r"\1\2", line)
        lines.append(re.sub(r"<list>(\w+)", r"list(\1)", line))
    chunks = re.split(r"^(?=(?:cdef )?class )", "\n".join(lines), flags=re.M)
    first = [chunk[5:] for chunk in chunks if chunk.startswith("cdef class ")]
    return "\n".join([chunks[0], *first, *[c for c in chunks[1:] if not c.startswith("cdef ")]])


@functools.cache
def learn2learn_data():
    """Return the module `learn2learn.data`, also as an attribute of `learn2learn`."""
    package = learn2learn()
    data = types.ModuleType("learn2learn.data")
    folder = f"{package.__path__[0]}/data"
    data.__path__ = [folder]
    package.data = data
    sys.modules.setdefault("requests", types.ModuleType("requests"))  # nothing is downloaded
    sys.modules["learn2learn.data"] = data
    for name in ("meta_dataset", "task_dataset", "transforms"):
        module = types.ModuleType(f"learn2learn.data.{name}")
        module.__package__ = "learn2learn.data"
        sys.modules[module.__name__] = module
        with open(f"{folder}/{name}.pyx") as file:
            exec(compile(as_python(file.read()), f"{name}.pyx", "exec"), vars(module))
        setattr(data, name, module)
    sys.modules.pop("learn2learn.data.utils", None)
    data.utils = importlib.import_module("learn2learn.data.utils")
    for module in (data.meta_dataset, data.task_dataset, data.utils):
        for name, value in vars(module).items():
            if isinstance(value, (type, types.FunctionType)):
                setattr(data, name, value)
    data.samplers = importlib.import_module("learn2learn.data.samplers")
    return data


@functools.cache
def learn2learn_vision():
    """Return `learn2learn.vision` with its data sets, benchmarks, transforms and models."""
    models = vision_models()
    learn2learn_data()
    package = learn2learn()
    names = ("", ".meta_dataset", ".task_dataset", ".transforms", ".utils", ".samplers")
    for name in names:  # `vision_models` puts a stand-in there
        sys.modules[f"learn2learn.data{name}"] = functools.reduce(
            getattr, filter(None, name.split(".")), package.data
        )
    package.vision = vision = sys.modules["learn2learn.vision"]
    vision.models = models
    before = set(sys.modules)
    with torchvision_stand_in.installed():
        for name in ("datasets", "transforms", "benchmarks"):
            module = importlib.import_module(f"learn2learn.vision.{name}")
            setattr(vision, name, module)
        kept = {n: m for n, m in sys.modules.items() if n not in before and "torchvision" not in n}
    sys.modules.update(kept)
    return vision
