"""The same training twice: fastkfo's Trainer, and the loop that learn2learn's scripts write."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers.learn2learn_peer import seen
from fastkfo.tasks import Episodes
from fastkfo.training import Evaluation, TrainConfig, Trainer
from fastkfo.training.evaluation import measure
from fastkfo.training.methods import Built, build
from fastkfo.training.sources import Problem, load, settled

Weights = dict[str, Tensor]


class Ours:
    """The Trainer, some iterations at a time.

    Args:
        config: what to train; its folder is written to.
    """

    name = "fastkfo"

    def __init__(self, config: TrainConfig) -> None:
        self._until = 0
        self._trainer = Trainer(config, stop=lambda: self._trainer.iteration >= self._until)
        self.problem, self.built = self._trainer.problem, self._trainer.built

    def advance(self, iterations: int) -> None:
        """So many iterations, and the checkpoint after them."""
        self._until += iterations
        self._trainer.run()


class Theirs:
    """Task after task: clone, adapt, backward; the same weights, tasks and Adam at the start.

    Args:
        config: what to train.
        l2l: learn2learn, as `tests.oracle` loads it.
    """

    name = "learn2learn"

    def __init__(self, config: TrainConfig, l2l: Any) -> None:
        if config.hidden_kfo_layers:
            raise ValueError("hidden_kfo_layers: learn2learn has no non-linear transform")
        self.config = config = settled(config)
        self.problem: Problem = load(config)
        self.built: Built = build(
            config, self.problem.shape, self.problem.outputs, self.problem.regression
        )
        self._loss = F.mse_loss if self.problem.regression else F.cross_entropy
        self._features = self.built.features
        self._learner = _learner(config, self.built.learner.module, l2l)
        self._learner.load_state_dict(self.built.learner.state_dict())
        parameters = list(self._learner.parameters())
        parameters += [] if self._features is None else list(self._features.parameters())
        self._optimizer = torch.optim.Adam(parameters, lr=config.meta_lr)

    def advance(self, iterations: int) -> None:
        """So many iterations; `built` then has the weights."""
        for _ in range(iterations):
            self._iterate(self.problem.tasks["train"].sample(self.config.meta_batch))
        self.built.learner.load_state_dict(self._learner.state_dict())

    def _iterate(self, episodes: Episodes) -> None:
        self._optimizer.zero_grad()
        for x_s, y_s, x_q, y_q in zip(*episodes, strict=True):
            x_s, x_q = seen(self._features, x_s, x_q)
            clone = self._learner.clone()
            for _ in range(self.config.steps):
                clone.adapt(self._loss(clone(x_s), y_s))
            (self._loss(clone(x_q), y_q) / self.config.meta_batch).backward()
        self._optimizer.step()


def weights(side: Ours | Theirs) -> Weights:
    """Everything that was learned, by name."""
    features = side.built.features
    named = {f"learner.{k}": v for k, v in side.built.learner.state_dict().items()}
    others = {} if features is None else features.state_dict()
    return {
        k: v.clone() for k, v in (named | {f"features.{k}": v for k, v in others.items()}).items()
    }


def distance(one: Weights, other: Weights) -> float:
    """The largest norm of a difference over the norm of the second."""
    return max(
        ((one[name] - value).norm() / value.norm().clamp_min(1e-30)).item()
        for name, value in other.items()
        if value.is_floating_point()
    )


def tested(side: Ours | Theirs, config: TrainConfig) -> Evaluation:
    """On the test tasks, which are the same for both; the batched evaluation for both."""
    tasks = load(config, ("test",)).tasks["test"]
    return measure(
        side.built,
        tasks,
        config.test_tasks,
        regression=side.problem.regression,
        steps=config.steps,
        chunk=config.meta_batch,
    )


def _learner(config: TrainConfig, model: nn.Module, l2l: Any) -> Any:
    """learn2learn's learner around a model that both share only in its shapes."""
    import copy

    model, lr = copy.deepcopy(model), config.fast_lr
    algorithms, first_order = l2l.algorithms, config.first_order
    if config.method == "meta-sgd":
        made = algorithms.MetaSGD(model, lr=lr, first_order=first_order)
    elif config.method.endswith("-kfo"):
        made = algorithms.GBML(
            model,
            l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear),
            lr=lr,
            adapt_transform=config.adapt_transform,
            first_order=first_order,
        )
    elif config.method == "meta-curvature":
        made = algorithms.GBML(
            model, l2l.optim.MetaCurvatureTransform, lr=lr, first_order=first_order
        )
    else:
        made = algorithms.MAML(model, lr=lr, first_order=first_order)
    return made.to(config.device, getattr(torch, config.dtype))
