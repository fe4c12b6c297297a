"""The options of benchmarks that are modules of their own, and their record."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import machine
from bench.records import RESULTS, Record


def options(doc: str | None, name: str) -> argparse.ArgumentParser:
    """The options that all have.

    Args:
        doc: of the module, which is its help.
        name: of the record, unless another one is given.

    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--minutes", type=float, default=10.0, help="no row is begun after this")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default=name, help="of the record")
    return parser


def begun(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, Record, float]:
    """What was asked for, the record, and when it has to end, by time.monotonic().

    Args:
        parser: from `options`.
        arguments: of the command line; None: the process's own.

    Returns:
        The three.
    """
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a machine with CUDA, got one where torch sees none")
    record = Record(given.results / machine.name(given.device) / f"{given.name}.json")
    return given, record, time.monotonic() + 60 * given.minutes
