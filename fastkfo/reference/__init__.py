"""The formulas in plain PyTorch; no kernel is imported here."""

from fastkfo.reference import gram, kron

__all__ = ["gram", "kron"]
