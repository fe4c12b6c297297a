"""Task distributions that yield whole meta-batches as tensors."""

from fastkfo.tasks import augmentations
from fastkfo.tasks.ahead import DrawAhead
from fastkfo.tasks.digits import DigitTasks
from fastkfo.tasks.distribution import Episodes, TaskDistribution
from fastkfo.tasks.few_shot import FewShotTasks
from fastkfo.tasks.loading import Labelled, read_dataset, read_folder
from fastkfo.tasks.splits import split_classes
from fastkfo.tasks.toys import BinaryClassificationTasks, LinearRegressionTasks, SinusoidTasks

__all__ = [
    "BinaryClassificationTasks",
    "DigitTasks",
    "DrawAhead",
    "Episodes",
    "FewShotTasks",
    "Labelled",
    "LinearRegressionTasks",
    "SinusoidTasks",
    "TaskDistribution",
    "augmentations",
    "read_dataset",
    "read_folder",
    "split_classes",
]
