"""Meta-KFO on digits, as learn2learn's loop: one task after the other."""

import torch
import torch.nn.functional as F
from torch import nn

import fastkfo as l2l
from fastkfo.tasks.digits import DigitTasks

TASKS, STEPS, ITERATIONS = 16, 5, 100


def main(iterations: int = ITERATIONS) -> float:
    """Train, and return the last meta-batch's loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))
    metaopt = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)
    gbml = l2l.algorithms.GBML(model, transform=metaopt, lr=0.1)
    opt = torch.optim.Adam(gbml.parameters(), lr=3e-3)
    tasks = DigitTasks("train", ways=5, shots=5, queries=5, seed=0)
    for iteration in range(iterations):
        x_s, y_s, x_q, y_q = tasks.sample(TASKS)
        opt.zero_grad()
        total = 0.0
        for t in range(TASKS):
            learner = gbml.clone()
            for _ in range(STEPS):
                learner.adapt(F.cross_entropy(learner(x_s[t]), y_s[t]))
            loss = F.cross_entropy(learner(x_q[t]), y_q[t]) / TASKS
            loss.backward()
            total += loss.item()
        opt.step()
        if iteration % 20 == 0:
            print(f"{iteration:4d}  query loss {total:.3f}")
    return total


if __name__ == "__main__":
    main()
