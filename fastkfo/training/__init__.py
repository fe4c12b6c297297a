"""Training and evaluation, from a config to a learner; what ``fastkfo train`` runs."""

from fastkfo.training.checkpoints import CheckpointError, load_checkpoint
from fastkfo.training.config import TrainConfig, from_mapping, read_config, write_config
from fastkfo.training.evaluation import Evaluation, evaluate
from fastkfo.training.methods import METHODS
from fastkfo.training.outcome import Diverged, Result, Watcher
from fastkfo.training.presets import PRESETS, preset
from fastkfo.training.sources import DATASETS
from fastkfo.training.statistics import Interval, interval
from fastkfo.training.trainer import Trainer

__all__ = [
    "DATASETS",
    "METHODS",
    "PRESETS",
    "CheckpointError",
    "Diverged",
    "Evaluation",
    "Interval",
    "Result",
    "TrainConfig",
    "Trainer",
    "Watcher",
    "evaluate",
    "from_mapping",
    "interval",
    "load_checkpoint",
    "preset",
    "read_config",
    "write_config",
]
