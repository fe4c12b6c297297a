"""JAX: `jit(grad(vmap))` of the same loop, in a process of its own, for its own threads and memory.

The modules are translated (jax_plan), sent to the process with their state and the tasks, and
compiled there (jax_worker). Nothing of JAX is imported here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import weakref
from importlib.util import find_spec
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers.jax_plan import loss_name, plan
from bench.problem import PREFIX, Functional, Gradient, Problem

ROOT = Path(__file__).resolve().parents[2]
GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


class Jax:
    """The peer.

    Attributes:
        timeout_s: seconds that a worker may take for its start, its compilation or a command.
    """

    name = "jax"
    timeout_s: float = 600

    def missing(self) -> str | None:
        absent = [name for name in ("jax", "jaxlib") if find_spec(name) is None]
        return f"{' and '.join(absent)} not installed; `pip install jax`" if absent else None

    def declines(self, problem: Problem) -> str | None:
        if problem.device == "cuda" and not any(find_spec(name) for name in GPU_PLUGINS):
            return "the JAX that is installed has no CUDA backend"
        try:
            _program(problem, Functional(problem))
        except TypeError as error:
            return str(error)
        return None

    def prepare(self, problem: Problem) -> JaxPrepared:
        return JaxPrepared(_job(problem), self.timeout_s)


class JaxPrepared:
    """A worker that has compiled the problem.

    Attributes:
        compile_s: seconds from the Python function to the executable.
        timeout_s: see `Jax`.
        pid: the worker's.
    """

    def __init__(self, job: dict[str, Any], timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._process, self._connection, self._output = _start(job["device"])
        self.pid: int | None = self._process.pid
        self.capturable = None
        # Also at the interpreter's exit, or when this is dropped without a close.
        self._end = weakref.finalize(self, _end, self._process, self._connection, self._output)
        try:
            self.compile_s: float | None = self._ask(job)
        except BaseException:
            self.close()
            raise

    def gradient(self) -> Gradient:
        found = self._ask("gradient")
        return {name: torch.from_numpy(g.copy()) for name, g in found.items()}

    def seconds(self) -> float:
        return self._ask("seconds")

    def peak_bytes(self) -> int | None:
        return self._ask("peak_bytes")

    def launches(self) -> int | None:
        return self._ask("launches")

    def recordings(self) -> int:
        return 0  # XLA's own graphs are made in the worker's first calls

    def modules(self) -> list[str]:
        """What the worker has imported."""
        return self._ask("modules")

    def close(self) -> None:
        self._end()

    def _ask(self, message: Any) -> Any:
        """Sends one message and waits for its answer.

        Raises:
            RuntimeError: The worker reports an error, or died.
            TimeoutError: It took too long, and was killed.
        """
        what = message if isinstance(message, str) else "compile"
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self.timeout_s, stop)
        timer.daemon = True
        timer.start()
        try:
            self._connection.send(message)
            done, answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._gone(what, late.is_set()) from None
        finally:
            timer.cancel()
        if not done:
            raise RuntimeError(f"jax worker, {what}: {answer}")
        return answer

    def _gone(self, what: str, late: bool) -> Exception:
        if not self._end.alive:
            return RuntimeError(f"jax worker, {what}: it is closed")
        self._process.kill()
        code = self._process.wait()
        self._output.seek(0)
        said = "".join(f"\n  {line}" for line in self._output.read().splitlines()[-5:])
        self.close()
        if late:
            return TimeoutError(f"jax worker, {what}: killed after {self.timeout_s:g} s{said}")
        return RuntimeError(f"jax worker, {what}: it died with exit status {code}{said}")


def _start(device: str) -> tuple[subprocess.Popen[bytes], Connection, Any]:
    """A worker, the connection to it and the file that takes what it prints."""
    output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (_end closes it)
    ours, theirs = Pipe()
    with theirs:
        fd = theirs.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.peers.jax_worker", str(fd)],
            cwd=ROOT,
            env=_environment(device),
            stdin=subprocess.PIPE,  # never written to: its end of file says that we are gone
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[fd],
        )
    return process, ours, output


def _environment(device: str) -> dict[str, str]:
    own = {"PJRT_NPROC": str(torch.get_num_threads())}  # as many threads as torch has
    if device == "cuda":
        own["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch is on the same device
    return os.environ | own


def _end(process: subprocess.Popen[bytes], connection: Connection, output: Any) -> None:
    process.kill()
    process.wait()
    connection.close()
    output.close()
    if process.stdin is not None:
        process.stdin.close()


def _job(problem: Problem) -> dict[str, Any]:
    """All that the worker needs, without torch."""
    form = Functional(problem)
    return _program(problem, form) | {
        "state": {name: _array(t) for name, t in form.state.items()},
        "tasks": [_array(t) for t in problem.data],
        "x64": problem.dtype == torch.float64,
        "device": problem.device,
    }


def _program(problem: Problem, form: Functional) -> dict[str, Any]:
    """What is computed. Parameters go by their full names throughout.

    Raises:
        TypeError: Part of it has no translation.
    """
    same = {name: name for name in form.state}
    theta = form.theta(same)
    phi = {
        theta[name]: (type(names).__name__, [n for n in names if n is not None])
        for name, names in form.phi(same).items()
    }
    return {
        "module": _plan(form.module, theta),
        "features": _features(form.features),
        "theta": list(theta.values()),
        "phi": phi,
        "loss": loss_name(problem.loss),
        "steps": problem.steps,
        "lr": form.lr,
        "psd": problem.psd,
        "adapt_transform": problem.adapt_transform,
    }


def _features(module: nn.Module | None) -> Any:
    if module is None:
        return None
    return _plan(module, {name: PREFIX + name for name, _ in module.named_parameters()})


def _plan(module: nn.Module, full: dict[str, str]) -> Any:
    return plan(module, {id(p): full[name] for name, p in module.named_parameters()})


def _array(t: Tensor) -> Any:
    t = t.detach().cpu()
    return (t if t.is_floating_point() else t.int()).numpy()


PEER = Jax()
