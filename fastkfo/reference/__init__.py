"""The formulas in plain PyTorch; no kernel is imported here."""

from fastkfo.reference import cross_entropy, gram, kron, norm

__all__ = ["cross_entropy", "gram", "kron", "norm"]
