"""Whole meta-batches at once: the batched learner, and the inner loop as a module."""

from fastkfo.inner_loop.captured import capture
from fastkfo.inner_loop.explain import explain
from fastkfo.inner_loop.inner_loop import InnerLoop
from fastkfo.inner_loop.learner import BatchedLearner
from fastkfo.inner_loop.loss import per_task

__all__ = ["BatchedLearner", "InnerLoop", "capture", "explain", "per_task"]
