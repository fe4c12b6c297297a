"""The one place that chooses an implementation for an op on a device."""

from __future__ import annotations

import os

import torch

from fastkfo.kernels import native

IMPLEMENTATIONS = ("auto", "native", "triton", "reference")


class ImplementationUnavailable(RuntimeError):
    """An implementation was asked for by name and is not there."""


# Ops that have CUDA kernels, and ops that have Triton kernels; "auto" takes them on CUDA, native
# ones first (bench/NOTES.md has what was measured).
ON_CUDA = ("inner_loop", "kron")
IN_TRITON = ("layers", "kron")
# Those whose kernels no record compares yet: "auto" leaves them to PyTorch on CUDA.
NOT_MEASURED = ("kron",)

_chosen: dict[tuple[str, str, int | None, str], str] = {}


def select(implementation: str, device: torch.device, op: str = "") -> str:
    """The implementation to run: "native", "triton" or "reference".

    "auto" follows the environment variable `FASTKFO_IMPLEMENTATION`, which is read once, and
    otherwise takes the fastest that is there. The variable is a name, or has names for some ops:
    "kron=native,layers=triton". A name never degrades to another; only in the variable, a lone
    "triton" is for those ops that have such kernels.

    Args:
        implementation: one of `IMPLEMENTATIONS`.
        device: where the operands are.
        op: which one, for those in `ON_CUDA` and `IN_TRITON`.

    Returns:
        The name of the implementation.

    Raises:
        ValueError: `implementation` is none of `IMPLEMENTATIONS`.
        ImplementationUnavailable: what was named is not available for `device`.
    """
    key = (implementation, device.type, device.index, op)
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = _chosen[key] = _select(implementation, str(device), op)
    return chosen


def reset() -> None:
    """Forget earlier choices, so that the environment is read again."""
    _chosen.clear()


def _select(implementation: str, device: str, op: str) -> str:
    name = "implementation"
    if implementation == "auto":
        implementation = _of_the_process(op)
        name = "FASTKFO_IMPLEMENTATION"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{name}: expected one of {IMPLEMENTATIONS}, got {implementation!r}")
    why = unavailable("native", device, op)
    if implementation == "auto":
        on_gpu = _kind(device) == "cuda"
        if on_gpu and op in NOT_MEASURED:
            return "reference"
        if why and on_gpu and op in IN_TRITON and not unavailable("triton", device, op):
            return "triton"
        return "reference" if why else "native"
    if implementation != "native":
        why = unavailable(implementation, device, op)
    if why:
        raise ImplementationUnavailable(f"{name}={implementation!r} on {device}: {why}")
    return implementation


def _of_the_process(op: str) -> str:
    """What the environment variable names for an op, or "auto"."""
    said = os.environ.get("FASTKFO_IMPLEMENTATION") or "auto"
    if "=" in said:
        pairs = [part.partition("=") for part in said.split(",")]
        unknown = {own.strip() for own, _, _ in pairs} - {*ON_CUDA, *IN_TRITON}
        if unknown:
            raise ValueError(
                f"FASTKFO_IMPLEMENTATION: expected ops among {sorted({*ON_CUDA, *IN_TRITON})}, "
                f"got {sorted(unknown)}"
            )
        return {own.strip(): name.strip() for own, _, name in pairs}.get(op, "auto")
    if said == "triton" and op not in IN_TRITON:
        return "auto"  # a process cannot have all ops in Triton
    return said


# torch.compile takes its result for a constant and does not trace into loading a library. This is
# what torch.compiler.assume_constant_result sets; importing that takes seconds.
_select._dynamo_marked_constant = True  # type: ignore[attr-defined]


def too_old(device: str = "cuda") -> str | None:
    """Why the CUDA kernels cannot run on a GPU, without an index the current one; or None."""
    if not torch.cuda.is_available() or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the kernels are for sm_80 and later, this is sm_{major}{minor}"


def _kind(device: str) -> str:
    return device.partition(":")[0]


def unavailable(implementation: str, device: str, op: str = "") -> str | None:
    """Why an implementation of an op cannot run on "cpu", "cuda" or "cuda:1"; None if it can."""
    if implementation == "reference":
        return None
    kind = _kind(device)
    if implementation == "triton":
        if op not in IN_TRITON:
            return "this op has no Triton kernel"
        from fastkfo.kernels import triton

        why = triton.why_unavailable(kind)
        return why or (too_old(device) if kind == "cuda" else None)
    if kind == "cuda" and op in ON_CUDA:
        return native.cuda_status().error or too_old(device)
    if kind != "cpu":
        return f"the native library has kernels of this op for the CPU only, not yet for {kind}"
    if not native.available():
        return f"the native library could not be loaded ({native.status().error})"
    return None


def why_reference(device: str, op: str) -> str | None:
    """Why "auto" takes the reference of an op on a device that may have kernels, or None."""
    if select("auto", torch.device(device), op) != "reference":
        return None
    on_gpu = _kind(device) == "cuda"
    in_triton = on_gpu and op in IN_TRITON
    if on_gpu and op in NOT_MEASURED:
        return "no record compares its kernels with PyTorch's yet"
    return unavailable("triton" if in_triton else "native", device, op)
