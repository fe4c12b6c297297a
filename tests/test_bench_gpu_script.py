"""bench/gpu.sh with a python that notes what it is called with: which steps, in which order."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gpu.sh"

pytestmark = [
    pytest.mark.slow,  # not once more on the reference: no kernel is called
    pytest.mark.skipif(
        not all(map(shutil.which, ("bash", "timeout", "tar"))), reason="needs bash and coreutils"
    ),
]

PYTHON = """\
#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in *"$FAILING"*) exit 3 ;; esac
"""


@pytest.fixture
def call(tmp_path):
    """Runs the script: its status, what python was called with, what it said, status.txt."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    calls, out = tmp_path / "calls", tmp_path / "out"

    def run(failing="nothing fails", **variables):
        own = {"PYTHON": str(python), "CALLS": str(calls), "FAILING": failing, "PREBUILT": "1"}
        inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        done = subprocess.run(
            ["bash", SCRIPT, out], env=inherited | own | variables, text=True, check=False,
            capture_output=True, timeout=120,
        )  # fmt: skip
        steps = ""
        if (out / "records.tar.gz").exists():
            with tarfile.open(out / "records.tar.gz") as archive:
                steps = archive.extractfile("records/status.txt").read().decode()
        seen = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, seen, done.stdout + done.stderr, steps.split("\n")[:-1]

    return run


def modules(calls):
    """Benchmarks, in their order: the module and the record's name."""
    found = []
    for words in [line.split() for line in calls if line.startswith("-m bench")]:
        name = words[words.index("--name") + 1] if "--name" in words else ""
        found.append(f"{words[1]} {name}".strip())
    return found


def test_every_row(call):
    names = ["small", "fc", "omniglot", "cifarfs", "miniimagenet", "compile"]
    status, calls, _, steps = call(STEPS="bench", ROWS=" ".join(names))
    assert status == 0
    assert modules(calls) == [f"bench {name}" for name in names]
    assert steps[-6:] == [f"bench-{name} 0" for name in names]
    rows = [line for line in calls if line.startswith("-m bench")]
    assert all("--device cuda" in row and "--peer inner_loop" in row for row in rows)
    assert "--peer jax" in rows[0]
    assert "--tasks 32" in rows[2]
    assert "--tasks 16" in rows[3]
    assert "--peer compile" in rows[5]


def test_every_sweep_and_the_kernels(call):
    status, calls, _, _ = call(STEPS="sweeps kernels launches", OPS="--op gram")
    assert status == 0
    assert modules(calls) == [
        "bench.kernels", "bench.launches", "bench scaling-tasks-sine-mlp",
        "bench scaling-tasks-anil-head", "bench scaling-tasks-omniglot-cnn",
        "bench scaling-steps-sine-mlp", "bench scaling-steps-omniglot-cnn",
    ]  # fmt: skip
    assert any(line.endswith("--op gram") for line in calls)
    sweeps = [line for line in calls if "--sweep" in line]
    assert all("--peer inner_loop_adjoint" in sweep for sweep in sweeps)
    assert ["--tasks 32" in sweep for sweep in sweeps] == [False] * 4 + [True]
    status, calls, _, _ = call(STEPS="sweeps", SWEEPS="steps:anil-head")
    assert modules(calls)[7:] == ["bench scaling-steps-anil-head"]


def test_no_benchmark_after_a_red_test(call):
    status, calls, _, steps = call("-m pytest", STEPS="gpu bench kernels")
    assert status == 3
    assert modules(calls) == []
    assert steps[-1] == "gpu 3"


def test_a_benchmark_that_fails_takes_no_other_along(call):
    status, calls, _, steps = call("--name fc", STEPS="bench", ROWS="small fc cifarfs")
    assert status == 3
    assert modules(calls) == ["bench small", "bench fc", "bench cifarfs"]
    assert steps[-3:] == ["bench-small 0", "bench-fc 3", "bench-cifarfs 0"]


def test_arguments_instead_of_rows(call):
    _, calls, _, _ = call(STEPS="bench", BENCH_ARGS="--sweep tasks --workload sine-mlp")
    assert modules(calls) == ["bench"]
    assert calls[-1].endswith("--sweep tasks --workload sine-mlp")


def test_out_of_time(call):
    status, calls, said, steps = call(STEPS="gpu kernels", LIMIT_S="3")
    assert status == 124
    assert not any("pytest" in line for line in calls)
    assert "no time left: run it alone" in said
    assert steps[-1] == "gpu 124"


@pytest.mark.parametrize(
    ("name", "value"), [("STEPS", "gpu bnech"), ("ROWS", "tiny"), ("TOOLS", "memchk")]
)
def test_misspelt(call, name, value):
    status, calls, said, _ = call(**{name: value})
    assert status == 2
    assert calls == []
    assert f"{name}: expected some of" in said
    assert f"got {value.split()[-1]}" in said


def test_sanitizers(call, tmp_path):
    """Every tool on every kind of kernel; what initcheck says of padded tapes does not count."""
    folder = tmp_path / "bin"
    folder.mkdir()
    tool = folder / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$*" >>"$CALLS"\ncase "$*" in *"$REFUSED"*) exit 9 ;; esac\n')
    tool.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    status, calls, _, _ = call(STEPS="sanitize", PATH=path, REFUSED="initcheck --error-exitcode 9 "
                               "--kernel-name kernel_substring=fastkfo")  # fmt: skip
    assert status == 0
    found = {(line.split()[1], line.split("=")[1].split()[0]) for line in calls if "--tool" in line}
    every = ("memcheck", "racecheck", "synccheck", "initcheck")
    kron = (SCRIPT.parent.parent / "tests" / "test_kron_gpu.py").exists()
    wanted = {(name, "fastkfo") for name in every} | {(name, "kron") for name in every if kron}
    assert found == wanted | {("memcheck", "_kernel"), ("racecheck", "_kernel")}
    status, *_ = call(STEPS="sanitize", PATH=path, REFUSED="racecheck")
    assert status == 9
