"""Meta-KFO under Lightning: an InnerLoop is a module like any other, a meta-batch is a batch."""

import argparse

import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import fastkfo as l2l
from fastkfo.tasks import DigitTasks, Episodes, TaskDistribution


class MetaBatches(IterableDataset):
    """An epoch: `length` meta-batches of `tasks` tasks."""

    def __init__(self, distribution: TaskDistribution, tasks: int, length: int) -> None:
        self.distribution, self.tasks, self.length = distribution, tasks, length

    def __iter__(self):
        return (self.distribution.sample(self.tasks) for _ in range(self.length))


class MetaKFO(lightning.LightningModule):
    """MAML-KFO of any model."""

    def __init__(self, model: nn.Module, fast_lr: float, meta_lr: float, steps: int) -> None:
        super().__init__()
        transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)
        gbml = l2l.algorithms.GBML(model, transform=transform, lr=fast_lr)
        self.inner_loop = l2l.InnerLoop(gbml, loss=F.cross_entropy, steps=steps)
        self.meta_lr = meta_lr

    def training_step(self, tasks: Episodes, index: int) -> torch.Tensor:
        return self.inner_loop(*tasks).loss.mean()

    def validation_step(self, tasks: Episodes, index: int) -> None:
        right = self.inner_loop(*tasks).predictions.argmax(-1) == tasks.y_q
        self.log("accuracy", right.double().mean(), batch_size=len(right), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.meta_lr)


def main(epochs: int = 5, iterations: int = 60, **trainer_options) -> float:
    """Train, and return the last validation's accuracy."""
    lightning.seed_everything(0, verbose=False)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))
    module = MetaKFO(model, fast_lr=0.1, meta_lr=3e-3, steps=5)
    loaders = [
        DataLoader(MetaBatches(DigitTasks(split, 5, 5, 5), tasks, length), batch_size=None)
        for split, tasks, length in (("train", 16, iterations), ("valid", 50, 2))
    ]
    trainer = lightning.Trainer(max_epochs=epochs, **trainer_options)
    trainer.fit(module, *loaders)
    return trainer.callback_metrics["accuracy"].item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
