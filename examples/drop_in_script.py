"""MAML-KFO on CIFAR-FS, written for learn2learn: nothing but the import of `l2l` was changed.

    python examples/drop_in_script.py ~/data 20000

In the manner of Meta-KFO's own scripts: the transform is itself adapted from the second step on.
"""

import random
import sys

import numpy as np
import torch
from torch import nn

import fastkfo as l2l

WAYS, SHOTS, STEPS, META_BATCH = 5, 5, 5, 4
FAST_LR, META_LR = 0.1, 5e-4


class CifarCNN(nn.Module):
    """Two blocks and a linear head."""

    def __init__(self, output_size, hidden=32, layers=2):
        super().__init__()
        self.features = l2l.vision.models.ConvBase(
            output_size=hidden, hidden=hidden, channels=3, max_pool=False, layers=layers
        )
        self.classifier = nn.Linear(hidden, output_size)

    def forward(self, x):
        """Map `[B, 3, 32, 32]` to `[B, output_size]`."""
        return self.classifier(self.features(x).mean(dim=(2, 3)))


def evaluate(task, learner, update, sgd):
    """Adapt on every other sample; return loss and accuracy on the others."""
    data, labels = task
    support = np.zeros(len(data), dtype=bool)
    support[np.arange(SHOTS * WAYS) * 2] = True
    support, query = torch.from_numpy(support), torch.from_numpy(~support)
    for step in range(STEPS):
        error = nn.functional.cross_entropy(learner(data[support]), labels[support])
        if step > 0:
            sgd(update, torch.autograd.grad(error, list(update.parameters()), create_graph=True))
        sgd(learner, update(error, learner.parameters(), create_graph=True, retain_graph=True))
    predictions = learner(data[query])
    error = nn.functional.cross_entropy(predictions, labels[query])
    return error, l2l.utils.accuracy(predictions, labels[query])


def main(root, iterations):
    """Train, and return the query loss of every iteration."""
    random.seed(1), torch.manual_seed(1)
    tasksets = l2l.vision.benchmarks.get_tasksets(
        "cifarfs", train_ways=WAYS, train_samples=2 * SHOTS, num_tasks=20000, root=root
    )
    model = CifarCNN(WAYS)
    kronecker = l2l.optim.transforms.KroneckerTransform(l2l.nn.KroneckerLinear)
    update = l2l.optim.ParameterUpdate(list(model.parameters()), transform=kronecker)
    sgd = l2l.optim.DifferentiableSGD(lr=FAST_LR)
    opt = torch.optim.Adam([*model.parameters(), *update.parameters()], lr=META_LR)
    losses = []
    for iteration in range(iterations):
        opt.zero_grad()
        results = []
        for _ in range(META_BATCH):
            learner, learned = l2l.clone_module(model), l2l.clone_module(update)
            results.append(evaluate(tasksets.train.sample(), learner, learned, sgd))
            (results[-1][0] / META_BATCH).backward()
        opt.step()
        losses.append(sum(error.item() for error, _ in results) / META_BATCH)
        accuracy = sum(float(accuracy) for _, accuracy in results) / META_BATCH
        print(f"{iteration:6d}  query loss {losses[-1]:.3f}  accuracy {accuracy:.3f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
