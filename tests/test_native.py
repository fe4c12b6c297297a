"""The loader and the selector, each test in a process of its own: both remember what they found."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cases import HAS_NATIVE, needs_native

pytestmark = pytest.mark.slow  # not once more on the reference: each sets its own environment

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("FASTKFO_LIBRARY", "FASTKFO_IMPLEMENTATION", "FASTKFO_COMPILE")
needs_prebuilt = pytest.mark.skipif(
    not (HAS_NATIVE and list((ROOT / "fastkfo").glob("_C*.so"))), reason="needs a built library"
)
PREAMBLE = """
import warnings, torch, fastkfo
from fastkfo.functional import gram, kron_transform
from fastkfo.kernels import native, selector
x = torch.ones(2, 2)
def raised(error, f, *args, **kwargs):
    try:
        f(*args, **kwargs)
    except error as e:
        return str(e)
    raise AssertionError("did not raise")
"""


def python(code, root=ROOT, preamble=PREAMBLE, **environment):
    """What `code` prints, in a fresh interpreter that imports fastkfo from `root`."""
    clean = {k: v for k, v in os.environ.items() if k not in KEPT}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", preamble + code],
        env=clean | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"} | environment,
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


REFUSED = """
assert native.status().source is None and not native.available()
(u,) = kron_transform([x], [x], psd=True)
assert torch.equal(u, 4 * x), u
assert selector.select("auto", x.device) == "reference"
for op in (kron_transform, gram):
    message = raised(fastkfo.ImplementationUnavailable, op, [x], implementation="native")
    assert "native" in message and "could not be loaded" in message, message
assert isinstance(fastkfo.ImplementationUnavailable("x"), RuntimeError)
by_name = {b.implementation: b for b in fastkfo.backends() if b.device == "cpu"}
assert not by_name["native"].available and by_name["reference"].available
assert by_name["native"].why and by_name["reference"].why is None
print(repr(fastkfo.backends()))
"""


def test_library_that_is_not_there(tmp_path):
    path = str(tmp_path / "missing.so")
    explained = python(REFUSED, FASTKFO_LIBRARY=path)
    assert "native library: none" in explained
    assert explained.count(path) >= 2  # for the library, and for the implementation
    assert "auto on cpu: reference" in explained
    assert "reference on cpu: available" in explained


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(60)])
def test_library_that_is_broken(tmp_path, content):
    path = tmp_path / "broken.so"
    path.write_bytes(content)
    assert str(path) in python(REFUSED, FASTKFO_LIBRARY=str(path))


def test_library_that_is_another(tmp_path):
    """A library that loads, but has none of our ops."""

    others = sorted(Path(torch.__file__).parent.glob("lib/libtorch_global_deps.*"))
    if not others:
        pytest.skip("no other library at hand")
    assert str(others[0]) in python(REFUSED, FASTKFO_LIBRARY=str(others[0]))


@needs_prebuilt
def test_library_by_name(tmp_path):
    [built] = (ROOT / "fastkfo").glob("_C*.so")
    copy = tmp_path / "elsewhere.so"
    shutil.copy(built, copy)
    code = """
assert native.status() == ("FASTKFO_LIBRARY", r"PATH", None), native.status()
(u,) = kron_transform([x], [x], implementation="native")
assert torch.equal(u, 2 * x)
"""
    python(code.replace("PATH", str(copy)), FASTKFO_LIBRARY=str(copy))


@needs_prebuilt
def test_prebuilt_library():
    explained = python("""
assert native.status().source == "prebuilt" and native.status().error is None
assert selector.select("auto", x.device) == "native"
assert native.status() is native.status()
print(fastkfo.backends())
""")
    assert "native library: prebuilt" in explained
    assert "auto on cpu: native" in explained


@pytest.mark.parametrize("name", ["reference", "native", "auto", ""])
def test_implementation_from_the_environment(name):
    if name == "native" and not HAS_NATIVE:
        pytest.skip("needs the native library")
    library = {} if HAS_NATIVE else {"FASTKFO_LIBRARY": "/nonexistent"}
    code = """
kron_transform([x], [x])
gram([x])
print(selector.select("auto", x.device))
"""
    expected = name if name in ("reference", "native") else "native" if HAS_NATIVE else "reference"
    assert python(code, FASTKFO_IMPLEMENTATION=name, **library) == expected


def test_unknown_implementation_from_the_environment():
    code = """
import os
for name in ("cuda", "Reference", "native ", "none"):
    os.environ["FASTKFO_IMPLEMENTATION"] = name
    selector.reset()
    for op in (kron_transform, gram):
        message = raised(ValueError, op, [x])
        assert "FASTKFO_IMPLEMENTATION" in message and name in message, message
    (u,) = kron_transform([x], implementation="reference")
    assert "FASTKFO_IMPLEMENTATION" in repr(fastkfo.backends())
"""
    python(code, FASTKFO_IMPLEMENTATION="cuda")


def test_unavailable_implementation_from_the_environment():
    code = """
for op in (kron_transform, gram):
    message = raised(fastkfo.ImplementationUnavailable, op, [x])
    assert "FASTKFO_IMPLEMENTATION='native'" in message and "/nonexistent" in message, message
(u,) = kron_transform([x], implementation="reference")
"""
    python(code, FASTKFO_IMPLEMENTATION="native", FASTKFO_LIBRARY="/nonexistent")


def test_triton_from_the_environment_is_for_ops_that_have_it():
    code = """
fastkfo.functional.cross_entropy(x[None], torch.zeros(1, len(x), dtype=torch.long))
images, pool = x[None, None, None], fastkfo.functional.max_pool2d
for op, operand in ((pool, (images, 1)), (kron_transform, ([x],))):
    message = raised(fastkfo.ImplementationUnavailable, op, *operand)
    assert "FASTKFO_IMPLEMENTATION='triton'" in message, message
"""
    python(code, FASTKFO_IMPLEMENTATION="triton", TRITON_INTERPRET="0")


def test_the_environment_may_name_implementations_of_some_ops():
    code = """
fastkfo.functional.max_pool2d(x[None, None, None], 1)
message = raised(fastkfo.ImplementationUnavailable, kron_transform, [x])
assert "FASTKFO_IMPLEMENTATION='triton'" in message, message
"""
    python(code, FASTKFO_IMPLEMENTATION="kron=triton, layers=reference", TRITON_INTERPRET="0")
    code = """
message = raised(ValueError, kron_transform, [x])
assert "expected ops among" in message and "'pool'" in message, message
"""
    python(code, FASTKFO_IMPLEMENTATION="pool=native")


def test_an_argument_precedes_the_environment():
    code = """
gram([x], implementation="reference")
raised(fastkfo.ImplementationUnavailable, gram, [x])
"""
    python(code, FASTKFO_IMPLEMENTATION="native", FASTKFO_LIBRARY="/nonexistent")


def test_reset_reads_the_environment_again():
    python("""
import os
os.environ["FASTKFO_IMPLEMENTATION"] = "reference"
assert selector.select("auto", x.device) == "reference"
os.environ["FASTKFO_IMPLEMENTATION"] = "nonsense"
assert selector.select("auto", x.device) == "reference"  # read once
selector.reset()
raised(ValueError, selector.select, "auto", x.device)
""")


def test_import_neither_loads_nor_compiles(tmp_path):
    """Nor does it import what compiles, start a process or touch a CUDA device."""
    preamble = """
import subprocess, sys, torch
seen = set(sys.modules)
def refuse(*args, **kwargs):
    raise AssertionError(f"called with {args}")
torch.ops.load_library = subprocess.Popen.__init__ = torch.cuda._lazy_init = refuse
import fastkfo
from fastkfo.kernels import native
assert native._status is None
assert not any("fastkfo" in op for op in torch._C._dispatch_get_all_op_names())
new = set(sys.modules) - seen
assert not new & {"torch.utils.cpp_extension", "triton", "torch._dynamo", "ninja"}, new
"""
    python("", preamble=preamble, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert not list(tmp_path.iterdir())


def copy_without_library(folder, csrc=True):
    ignored = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(ROOT / "fastkfo", folder / "fastkfo", ignore=ignored)
    if csrc:
        shutil.copytree(ROOT / "csrc", folder / "csrc")


def test_compiling_can_be_switched_off(tmp_path):
    copy_without_library(tmp_path)
    explained = python(REFUSED, root=tmp_path, FASTKFO_COMPILE="0")
    assert "prebuilt: no file _C*.so" in explained
    assert "switched off by FASTKFO_COMPILE=0" in explained


def test_no_library_and_no_sources(tmp_path):
    copy_without_library(tmp_path, csrc=False)
    explained = python(REFUSED, root=tmp_path)
    assert "prebuilt: no file _C*.so" in explained
    assert "the folder csrc is neither in the package nor beside it" in explained


def test_broken_prebuilt_library_without_sources(tmp_path):
    copy_without_library(tmp_path, csrc=False)
    (tmp_path / "fastkfo" / "_C.abi3.so").write_bytes(b"broken")
    explained = python(REFUSED, root=tmp_path)
    assert "_C.abi3.so" in explained
    assert "csrc" in explained  # both causes


def test_sources_that_do_not_compile(tmp_path):
    copy_without_library(tmp_path)
    library = tmp_path / "csrc" / "library.cpp"
    library.write_text("#error broken on purpose\n")
    for path in (tmp_path / "csrc" / "cpu").glob("*.cpp"):
        path.unlink()
    explained = python(REFUSED, root=tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert "compiled on first use" in explained
    assert "error" in explained.lower()


@needs_native
def test_compiled_on_first_use(tmp_path):
    """Once: a second process finds the library in torch's cache of extensions."""
    copy_without_library(tmp_path)
    flags = tmp_path / "fastkfo" / "kernels" / "build_flags.py"
    text = flags.read_text()
    assert '"-O3"' in text
    flags.write_text(text.replace('"-O3"', '"-O0"'))  # in a quarter of the time
    code = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    (u,) = kron_transform([x], [x], psd=True, implementation="native")
assert torch.equal(u, 4 * x)
assert any("compiling the native kernels" in str(w.message) for w in caught)
status = native.status()
assert status.source == "compiled" and "no file _C*.so" in status.error, status
print(status.path)
"""
    cache = tmp_path / "cache"
    [path] = {python(code, root=tmp_path, TORCH_EXTENSIONS_DIR=str(cache)) for _ in range(2)}
    assert Path(path).is_relative_to(cache)
    assert Path(path).is_file()


@needs_prebuilt
def test_many_threads_load_it_once():
    python("""
import threading
calls, load = [], torch.ops.load_library
torch.ops.load_library = lambda path: (calls.append(path), load(path))
results = []
def run():
    results.append(kron_transform([x], [x], implementation="native")[0])
workers = [threading.Thread(target=run) for _ in range(8)]
for w in workers: w.start()
for w in workers: w.join()
assert len(calls) == 1 and len(results) == 8, (calls, results)
assert all(torch.equal(r, 2 * x) for r in results)
""")
