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

_chosen: dict[tuple[str, str, str], str] = {}


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
    key = (implementation, device.type, op)
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = _chosen[key] = _select(implementation, device.type, op)
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
        if device == "cuda" and op in NOT_MEASURED:
            return "reference"
        if device == "cuda" and op in IN_TRITON and not unavailable("triton", device, op):
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


def too_old() -> str | None:
    """Why the CUDA kernels cannot run on the GPU that is there, or None."""
    if not torch.cuda.is_available() or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"the kernels are for sm_80 and later, this is sm_{major}{minor}"


def unavailable(implementation: str, device: str, op: str = "") -> str | None:
    """Why an implementation of an op cannot run on a kind of device, or None if it can."""
    if implementation == "reference":
        return None
    if implementation == "triton":
        if op not in IN_TRITON:
            return "this op has no Triton kernel"
        from fastkfo.kernels import triton

        return triton.why_unavailable(device) or (too_old() if device == "cuda" else None)
    if device == "cuda" and op in ON_CUDA:
        return native.cuda_status().error or too_old()
    if device != "cpu":
        return f"the native library has kernels of this op for the CPU only, not yet for {device}"
    if not native.available():
        return f"the native library could not be loaded ({native.status().error})"
    return None
