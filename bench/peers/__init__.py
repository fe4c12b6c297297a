"""The implementations that are measured side by side, one file each.

Nothing is imported until it is asked for: a worker of one peer does not load the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.peers.base import Peer

# In the order of the tables. The first is the oracle, and what ratios are taken to.
NAMES = (
    "learn2learn", "fastkfo", "inner_loop", "batched", "reference", "vmap", "jax", "compile",
    "torchopt", "higher", "inner_loop_adjoint",
)  # fmt: skip
BY_DEFAULT = ("learn2learn", "fastkfo", "inner_loop", "reference", "vmap", "jax")
ORACLE = "learn2learn"


def peer(name: str) -> Peer:
    """The peer of a name.

    Raises:
        ValueError: It is unknown; the message lists those that are known.
    """
    if name not in NAMES:
        raise ValueError(f"peer: expected one of {', '.join(NAMES)}, got {name!r}")
    found: Peer = import_module(f"bench.peers.{name}_peer").PEER
    return found
