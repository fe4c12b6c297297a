"""What the demo compares: three ways to meta-learn one small CNN, and how each is run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fastkfo.algorithms import GBML, MAML
from fastkfo.nn import KroneckerLinear, LinNet
from fastkfo.optim import KroneckerTransform
from fastkfo.reference.loop import MetaGradient, factors_of, meta_gradient
from fastkfo.tasks import Episodes

__all__ = ["FEATURES", "METHODS", "Run", "Settings", "build_runs"]

METHODS = ("MAML", "MAML + linear", "MAML-KFO")
CHANNELS = 16
FEATURES = 64


@dataclass(frozen=True)
class Settings:
    """The demo's options; the command's help says what each means."""

    minutes: float = 3.0
    iterations: int = 300
    seed: int = 0
    out: Path = Path("fastkfo-demo")
    ways: int = 5
    shots: int = 5
    queries: int = 15
    steps: int = 5
    meta_batch: int = 4
    inner_lr: float = 0.3
    meta_lr: float = 0.001
    extra_layers: int = 3
    test_tasks: int = 250
    valid_tasks: int = 50
    rounds: int = 15
    threads: int = 1


@dataclass
class Run:
    """One method: its learner, and everything measured of it.

    Attributes:
        name: One of ``METHODS``.
        model: What is meta-trained.
        learner: The model, and for MAML-KFO the transform.
        optimizer: Of the learner's parameters (the transform's included).
        steps: Inner steps.
        lr: Inner learning rate.
        losses: Mean query loss of every meta-iteration.
        curve: Per validation: iteration, and the accuracies [tasks, steps + 1].
        failure: Why training stopped early, if it did.
        test: Accuracies on the test tasks, [tasks, 2 * steps + 1].
        not_finite: Test tasks for which a prediction was not finite.
        reference_seconds: Time of the plain loop's meta-gradient, one entry per round.
        fastkfo_seconds: Time of fastkfo's, in the same rounds.
        differences: Largest relative difference of the two, one entry per round.
    """

    name: str
    model: nn.Module
    learner: GBML | MAML
    optimizer: torch.optim.Optimizer
    steps: int
    lr: float
    losses: list[float] = field(default_factory=list)
    curve: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    failure: str | None = None
    test: torch.Tensor | None = None
    not_finite: int = 0
    reference_seconds: list[float] = field(default_factory=list)
    fastkfo_seconds: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)

    def meta_gradient(self, tasks: Episodes) -> float:
        """Accumulates the meta-gradient in ``.grad``: learn2learn's own loop, on fastkfo.

        Args:
            tasks: The meta-batch.

        Returns:
            The mean query loss.
        """
        self.optimizer.zero_grad()
        total = 0.0
        for x_s, y_s, x_q, y_q in zip(*tasks, strict=True):
            learner = self.learner.clone()
            for _ in range(self.steps):
                learner.adapt(F.cross_entropy(learner(x_s), y_s))
            loss = F.cross_entropy(learner(x_q), y_q) / len(tasks.x_s)
            loss.backward()
            total += loss.item()
        return total

    def reference_gradient(self, tasks: Episodes) -> MetaGradient:
        """Computes the same with the plain PyTorch loop.

        Args:
            tasks: The meta-batch.

        Returns:
            Losses and gradients.
        """
        return meta_gradient(
            self.model,
            *tasks,
            loss=F.cross_entropy,
            steps=self.steps,
            lr=self.lr,
            factors=factors_of(self.learner) if isinstance(self.learner, GBML) else None,
        )

    def difference(self, reference: MetaGradient) -> float:
        """Compares ``.grad`` with a reference.

        Args:
            reference: What :meth:`reference_gradient` returned for the same tasks.

        Returns:
            The largest norm of a difference over the norm of the reference, of all parameters and
            factors; NaN if either is not finite.
        """
        pairs = [(p.grad, reference.parameters[name]) for name, p in self.model.named_parameters()]
        if isinstance(self.learner, GBML):
            for name, factors in factors_of(self.learner).items():
                pairs += [
                    (f.grad, g)
                    for f, g in zip(factors, reference.factors[name], strict=True)
                    if f is not None and g is not None
                ]
        worst = torch.zeros(())
        for ours, theirs in pairs:
            ours = torch.zeros_like(theirs) if ours is None else ours
            scale = theirs.norm().clamp_min(torch.finfo(theirs.dtype).tiny)
            worst = torch.maximum(worst, (ours - theirs).norm() / scale)  # keeps NaN
        return worst.item()

    @torch.enable_grad()
    def accuracies(
        self, x_s: torch.Tensor, y_s: torch.Tensor, x_q: torch.Tensor, y_q: torch.Tensor, steps: int
    ) -> tuple[list[float], bool]:
        """Adapts to one task, and looks at the query samples before and after every step.

        Args:
            x_s: Support images ``[S, 1, 8, 8]``.
            y_s: Support labels ``[S]``.
            x_q: Query images ``[Q, 1, 8, 8]``.
            y_q: Query labels ``[Q]``.
            steps: Inner steps.

        Returns:
            The accuracies, ``steps + 1`` of them, and whether all predictions were finite.
        """
        learner = self.learner.clone(first_order=True)  # the same numbers, with no graph kept
        accuracies, finite = [], True
        for step in range(steps + 1):
            if step > 0:
                learner.adapt(F.cross_entropy(learner(x_s), y_s))
            with torch.no_grad():
                predictions = learner(x_q)
            finite = finite and bool(predictions.isfinite().all())
            accuracies.append((predictions.argmax(-1) == y_q).float().mean().item())
        return accuracies, finite

    def best_known(self) -> torch.Tensor | None:
        """Returns the test's accuracies, else the last validation's, [tasks, steps + 1]."""
        if self.test is not None:
            return self.test
        return self.curve[-1][1] if self.curve else None


def build_model(ways: int, extra_layers: int) -> nn.Sequential:
    """Builds the CNN: two 3x3 convolutions of stride 2 with ReLU, then a linear head.

    Args:
        ways: Classes.
        extra_layers: Linear layers, with no non-linearity between, before the head. They add
            nothing to what the model can express, only to how it can be adapted.

    Returns:
        The model, for images ``[S, 1, 8, 8]``.
    """
    return nn.Sequential(
        nn.Conv2d(1, CHANNELS, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        LinNet(extra_layers + 1, FEATURES, ways),
    )


def build_runs(settings: Settings) -> list[Run]:
    """Builds the three methods, each from the same seed.

    Args:
        settings: The demo's options.

    Returns:
        One run for each of ``METHODS``.
    """
    runs = []
    for name in METHODS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            extra = settings.extra_layers if name == METHODS[1] else 0
            model = build_model(settings.ways, extra)
        learner: GBML | MAML
        if name == METHODS[2]:
            transform = KroneckerTransform(KroneckerLinear, psd=True)
            learner = GBML(model, transform=transform, lr=settings.inner_lr)
        else:
            learner = MAML(model, lr=settings.inner_lr)
        optimizer = torch.optim.Adam(learner.parameters(), lr=settings.meta_lr)
        runs.append(Run(name, model, learner, optimizer, settings.steps, settings.inner_lr))
    return runs
