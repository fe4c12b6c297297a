"""The process that JAX runs in: `python -m bench.peers.jax_worker FD`, started by jax_peer.

FD is a connection to the parent. The first message is the job, every later one a command; each is
answered by (True, result) or (False, why not). torch is never imported: its threads and its memory
would be measured with JAX's. End of file on stdin says that the parent is gone.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bench.memory import resident_growth

State = dict[str, Array]
Job = Mapping[str, Any]

WARM_CALLS = 3  # on a GPU: XLA records its launches as graphs in the first calls
NOT_EXECUTED = {"parameter", "constant", "tuple", "bitcast", "get-tuple-element"}


def linear(layer: Job, state: State, x: Array) -> Array:
    y = x @ state[layer["weight"]].T
    return y if layer["bias"] is None else y + state[layer["bias"]]


def conv(layer: Job, state: State, x: Array) -> Array:
    w, stride = state[layer["weight"]], layer["stride"]
    padding = [(0, 0), (0, 0), *((p, p) for p in layer["padding"])]
    if jax.default_backend() == "cpu":
        # vmap makes one grouped convolution of all tasks', which XLA's CPU compiler does about ten
        # times slower than this product.
        y = _by_patches(jnp.pad(x, padding), w, stride)
    else:
        y = jax.lax.conv_general_dilated(x, w, stride, padding[2:])
    return y if layer["bias"] is None else y + state[layer["bias"]][:, None, None]


def _by_patches(x: Array, w: Array, stride: tuple[int, int]) -> Array:
    """A convolution as one product with the weight; channels last in between."""
    outputs, _, *window = w.shape
    x = x.transpose(0, 2, 3, 1)
    rows, columns = ((n - k) // s + 1 for n, k, s in zip(x.shape[1:3], window, stride, strict=True))
    patches = [
        x[:, i:, j:][:, :: stride[0], :: stride[1]][:, :rows, :columns]
        for i in range(window[0])
        for j in range(window[1])
    ]
    product = jnp.concatenate(patches, -1) @ w.transpose(2, 3, 1, 0).reshape(-1, outputs)
    return product.transpose(0, 3, 1, 2)


def batch_norm(layer: Job, state: State, x: Array) -> Array:
    axes = (0, *range(2, x.ndim))
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    y = (x - mean) * jax.lax.rsqrt(variance + layer["eps"])
    if layer["weight"] is None:
        return y
    shape = (-1, *(1 for _ in axes[1:]))
    return y * state[layer["weight"]].reshape(shape) + state[layer["bias"]].reshape(shape)


def max_pool(layer: Job, state: State, x: Array) -> Array:
    """The largest of each tile.

    Not by max(): its derivative compares with the maximum, and where XLA computes the input once
    more for that, rounded otherwise, nothing is equal to it and the gradient is lost.
    """
    (a, b), (rows, columns) = layer["size"], x.shape[2:]
    x = x[:, :, : rows // a * a, : columns // b * b]
    tiles = x.reshape(*x.shape[:2], rows // a, a, columns // b, b).swapaxes(3, 4)
    tiles = tiles.reshape(*tiles.shape[:4], a * b)
    largest = jax.nn.one_hot(tiles.argmax(-1), a * b, dtype=x.dtype)
    return (tiles * largest).sum(-1)


LAYERS: dict[str, Callable[[Job, State, Array], Array]] = {
    "linear": linear,
    "conv": conv,
    "batch_norm": batch_norm,
    "max_pool": max_pool,
    "relu": lambda layer, state, x: jax.nn.relu(x),
    "flatten": lambda layer, state, x: x.reshape(len(x), -1),
    "reshape": lambda layer, state, x: x.reshape(layer["shape"]),
    "mean_of_pixels": lambda layer, state, x: x.mean((2, 3)),
}


def forward(plan: list[Job], state: State, x: Array) -> Array:
    for layer in plan:
        x = LAYERS[layer["kind"]](layer, state, x)
    return x


def cross_entropy(logits: Array, y: Array) -> Array:
    # One-hot: indexing would become gathers and scatters, which are slow.
    hot = jax.nn.one_hot(y, logits.shape[-1], dtype=logits.dtype)
    return -(hot * jax.nn.log_softmax(logits)).sum(-1).mean()


def mse(predicted: Array, y: Array) -> Array:
    return ((predicted - y) ** 2).mean()


LOSSES = {"cross_entropy": cross_entropy, "mse": mse}


def kronecker(g: Array, psd: bool, left: Array, right: Array, bias: Array | None = None) -> Array:
    if psd:
        left, right = left.T @ left, right.T @ right
    u = left @ g.reshape(-1, len(left), len(right)) @ right
    return (u if bias is None else u + bias).reshape(g.shape)


def scale(g: Array, psd: bool, factor: Array) -> Array:
    return factor * g


def curvature(
    g: Array, psd: bool, first: Array, second: Array | None = None, kernel: Array | None = None
) -> Array:
    if second is None:
        return first * g
    if kernel is None:
        return first @ g @ second
    u = second.T @ g.reshape(len(first), len(second), len(kernel)) @ kernel.T
    return (first @ u.reshape(len(first), -1)).reshape(g.shape)


TRANSFORMS: dict[str, Callable[..., Array]] = {
    "Factors": kronecker,
    "Scale": scale,
    "Curvature": curvature,
}


def query_loss(job: Job) -> Callable[..., Array]:
    """The loss of one task after K inner steps, as a function of the state and the task."""
    loss_of, lr, phi_names = LOSSES[job["loss"]], job["lr"], job["phi"]

    def loss(theta: State, x: Array, y: Array) -> Array:
        return loss_of(forward(job["module"], theta, x), y)

    def update(name: str, g: Array, phi: list[Array]) -> Array:
        return TRANSFORMS[phi_names[name][0]](g, job["psd"], *phi)

    def adapted(name: str, last: Array, g: Array, phi: list[Array]) -> list[Array]:
        _, pull = jax.vjp(lambda phi: update(name, last, phi), phi)
        return [f + lr**2 * d for f, d in zip(phi, pull(g)[0], strict=True)]

    def task(state: State, x_s: Array, y_s: Array, x_q: Array, y_q: Array) -> Array:
        if job["features"] is not None:
            seen = forward(job["features"], state, jnp.concatenate([x_s, x_q]))
            x_s, x_q = seen[: len(x_s)], seen[len(x_s) :]
        theta = {name: state[name] for name in job["theta"]}
        phi = {name: [state[n] for n in names] for name, (_, names) in phi_names.items()}
        last: State = {}
        for _ in range(job["steps"]):
            g = jax.grad(loss)(theta, x_s, y_s)
            if job["adapt_transform"] and last:
                phi = {n: adapted(n, last[n], g[n], phi[n]) for n in phi}
            theta = {
                n: p - lr * (update(n, g[n], phi[n]) if n in phi else g[n])
                for n, p in theta.items()
            }
            last = g
        return loss(theta, x_q, y_q)

    return task


def meta_gradient(job: Job) -> Callable[..., State]:
    """The gradient of the sum of all tasks' query losses."""
    tasks_loss = jax.vmap(query_loss(job), in_axes=(None, 0, 0, 0, 0))
    return jax.grad(lambda state, *tasks: tasks_loss(state, *tasks).sum())


class Worker:
    """One compiled meta-gradient, with its inputs on the device."""

    def __init__(self, job: Job) -> None:
        self._device = jax.devices(job["device"])[0]
        self._inputs = jax.device_put((job["state"], *job["tasks"]), self._device)
        begin = time.perf_counter()
        self._compiled = jax.jit(meta_gradient(job)).lower(*self._inputs).compile()
        self.compile_s = time.perf_counter() - begin
        for _ in range(0 if self._device.platform == "cpu" else WARM_CALLS):
            self._run()

    def gradient(self) -> dict[str, Any]:
        return jax.device_get(self._run())

    def seconds(self) -> float:
        begin = time.perf_counter()
        self._run()
        return time.perf_counter() - begin

    def peak_bytes(self) -> int | None:
        if self._device.platform == "cpu":
            return resident_growth(self._run)
        held = self._device.memory_stats()["bytes_in_use"]
        self._run()
        # Nothing resets this mark: what compiling took for its own trials counts, if it was more.
        return self._device.memory_stats()["peak_bytes_in_use"] - held

    def launches(self) -> int:
        return executed(self._compiled.as_text() or "")

    def modules(self) -> list[str]:
        """The top-level modules that are loaded, to check that torch is not."""
        return sorted({name.partition(".")[0] for name in sys.modules})

    def _run(self) -> State:
        return jax.block_until_ready(self._compiled(*self._inputs))


def executed(hlo: str) -> int:
    """How many instructions of a compiled program's entry XLA executes, one after the other."""
    entry = hlo.partition("\nENTRY ")[2].partition("\n}")[0]
    found = re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = .*?\s([a-z][\w-]*)\(", entry, re.MULTILINE)
    return sum(opcode not in NOT_EXECUTED for opcode in found)


def configure(job: Job) -> None:
    jax.config.update("jax_platforms", job["device"])
    jax.config.update("jax_enable_x64", job["x64"])
    jax.config.update("jax_default_matmul_precision", "highest")  # else float32 may be less


def serve(connection: Connection) -> None:
    """Answers until the parent closes the connection."""
    worker: Any = None
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        try:
            if worker is None:
                configure(message)
                worker = Worker(message)
                answer = worker.compile_s
            else:
                answer = getattr(worker, message)()
        except Exception as error:
            connection.send((False, "".join(traceback.format_exception_only(error)).strip()))
        else:
            connection.send((True, answer))


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)  # a compilation under way would hold up any other way out


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    fd = int(sys.argv[1])
    os.set_inheritable(fd, False)  # what JAX starts must not keep the connection open
    serve(Connection(fd))
