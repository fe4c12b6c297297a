"""Meta-KFO on digits, with InnerLoop: the whole meta-batch from one call."""

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
    inner_loop = l2l.InnerLoop(gbml, loss=F.cross_entropy, steps=STEPS)
    for iteration in range(iterations):
        x_s, y_s, x_q, y_q = tasks.sample(TASKS)
        opt.zero_grad()
        loss = inner_loop(x_s, y_s, x_q, y_q).loss.mean()
        loss.backward()
        total = loss.item()
        opt.step()
        if iteration % 20 == 0:
            print(f"{iteration:4d}  query loss {total:.3f}")
    return total


if __name__ == "__main__":
    main()
