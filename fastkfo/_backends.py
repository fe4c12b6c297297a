"""What is compiled in and loaded, in words."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastkfo.kernels import native, selector


class Backend(NamedTuple):
    """One implementation on one kind of device; `why` says why it is not available."""

    implementation: str
    device: str
    available: bool
    why: str | None


class Backends(tuple[Backend, ...]):
    """Every implementation on every kind of device; printing it explains."""

    def __repr__(self) -> str:
        loaded = native.status()
        lines = [
            f"native library: {loaded.source or 'none'}" + f" ({loaded.path or loaded.error})",
            f"threads: {torch.get_num_threads()}",
        ]
        if torch.version.cuda is not None:
            cuda = native.cuda_status()
            lines.insert(1, f"CUDA library: {cuda.source or 'none'} ({cuda.path or cuda.error})")
        for backend in self:
            state = "available" if backend.available else f"not available: {backend.why}"
            lines.append(f"{backend.implementation} on {backend.device}: {state}")
        for device in dict.fromkeys(backend.device for backend in self):
            try:
                chosen = selector.select("auto", torch.device(device))
            except (ValueError, RuntimeError) as error:
                chosen = str(error)
            lines.append(f"auto on {device}: {chosen}")
            if device == "cuda":
                ops = dict.fromkeys([*selector.ON_CUDA, *selector.IN_TRITON])
                lines += [_of_cuda(op) for op in ops]
        return "\n".join(lines)


def _of_cuda(op: str) -> str:
    """What is taken for an op that has kernels for CUDA, and why if it is none of these."""
    try:
        chosen = selector.select("auto", torch.device("cuda"), op)
    except (ValueError, RuntimeError) as error:
        return f"auto on cuda, {op}: {error}"
    why = selector.why_reference("cuda", op)
    return f"auto on cuda, {op}: {chosen}" + (f" ({why})" if why else "")


def backends() -> Backends:
    """Load the native library if that was not tried yet, and report every implementation.

    Returns:
        A tuple of `Backend(implementation, device, available, why)`, whose `repr` is an
        explanation for people.
    """
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return Backends(
        Backend(name, device, why is None, why)
        for name in selector.IMPLEMENTATIONS[1:]
        for device in devices
        for why in (selector.unavailable(name, device, "layers" if name == "triton" else ""),)
    )
