"""ANIL-KFO, as Meta-KFO's scripts train it, on digits: the head and its transform adapt alone."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import fastkfo as l2l
from fastkfo.tasks import DigitTasks


def main(
    iterations: int = 500, ways: int = 5, shots: int = 5, steps: int = 5, meta_batch: int = 16,
    fast_lr: float = 0.1, meta_lr: float = 0.001, seed: int = 0,
) -> float:  # fmt: skip
    """Train, and return the accuracy on tasks of digits that were never seen."""
    torch.manual_seed(seed)
    features = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(),
    )  # fmt: skip
    head = nn.Linear(64, ways)
    transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)
    gbml = l2l.algorithms.GBML(head, transform=transform, lr=fast_lr, adapt_transform=True)
    # The features run once per task, in front of the loop; its native call gives their gradient.
    inner_loop = l2l.InnerLoop(gbml, loss=F.cross_entropy, steps=steps, features=features)
    opt = torch.optim.Adam(inner_loop.parameters(), lr=meta_lr)
    tasks = DigitTasks("train", ways, shots, queries=shots, seed=seed)
    for iteration in range(iterations):
        opt.zero_grad()
        loss = inner_loop(*tasks.sample(meta_batch)).loss.mean()
        loss.backward()
        opt.step()
        if iteration % 20 == 0:
            print(f"{iteration:4d}  query loss {loss.item():.3f}")

    test = DigitTasks("test", ways, shots, queries=15, seed=seed).sample(200)
    with torch.no_grad():
        predictions = inner_loop(*test).predictions
    accuracy = (predictions.argmax(-1) == test.y_q).double().mean().item()
    print(f"accuracy on 200 tasks of unseen digits: {100 * accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=500)
    main(parser.parse_args().iterations)
