"""What a record was made with: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "triton", "jax", "jaxlib", "torchopt", "higher", "pytest-benchmark")


def environment(device: str) -> dict[str, Any]:
    """All that a reader needs to judge, and repeat, a reading."""
    return {
        "machine": name(device),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "python": platform.python_version(),
        "versions": {p: v for p in PACKAGES if (v := _version(p))} | {"learn2learn": "0.2.0"},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "load": os.getloadavg()[0],
    }


def name(device: str) -> str:
    """The machine's folder under bench/results: `amd-epyc-2-cores`, `nvidia-h200`."""
    full = torch.cuda.get_device_name() if device == "cuda" else f"{_cpu()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", full.lower()).strip("-")


def commit() -> str:
    """Of the checkout, with `+changes` where what is measured is not what was committed."""
    changed = _git("status", "--porcelain", "--", "csrc", "fastkfo", "bench/*.py", "bench/peers")
    return (_git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*: (.*)", text)
    return found[1].strip() if found else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
