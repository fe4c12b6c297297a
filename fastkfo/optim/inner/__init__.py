"""What takes the steps of an inner loop: optimizers, clipping and learning rates per step."""

from fastkfo.optim.inner.adam import Adam
from fastkfo.optim.inner.optimizer import START, InnerOptimizer, OptimizerState
from fastkfo.optim.inner.per_step_lr import PerStepLR
from fastkfo.optim.inner.rmsprop import RMSProp
from fastkfo.optim.inner.sgd import SGD

__all__ = ["SGD", "START", "Adam", "InnerOptimizer", "OptimizerState", "PerStepLR", "RMSProp"]
