"""Benchmarks take the tests' `device` fixture, and its skipping where there is no GPU."""

from tests.conftest import device, pytest_collection_modifyitems, seed

__all__ = ["device", "pytest_collection_modifyitems", "seed"]
