"""Meta-learning algorithms with learn2learn's interface."""

from fastkfo.algorithms.base_learner import BaseLearner
from fastkfo.algorithms.gbml import GBML
from fastkfo.algorithms.maml import MAML, maml_update
from fastkfo.algorithms.meta_sgd import MetaSGD, meta_sgd_update

__all__ = ["GBML", "MAML", "BaseLearner", "MetaSGD", "maml_update", "meta_sgd_update"]
