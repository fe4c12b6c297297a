"""How updates change the parameters of a module."""

from fastkfo.optim.update_rules.differentiable_sgd import DifferentiableSGD

__all__ = ["DifferentiableSGD"]
