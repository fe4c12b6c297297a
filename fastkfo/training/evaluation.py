"""Adapting to unseen tasks, and how well it went."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastkfo.tasks import Episodes, TaskDistribution
from fastkfo.training import sources
from fastkfo.training.checkpoints import CheckpointError, load_checkpoint, load_weights
from fastkfo.training.config import TrainConfig, from_mapping
from fastkfo.training.methods import Built, build
from fastkfo.training.statistics import Interval, interval

__all__ = ["Evaluation", "evaluate", "measure"]


#: Tasks are drawn so many at a time, whatever is computed at a time: how a generator's numbers
#: become tasks depends on it, and every training is to be scored on the same ones.
DRAWN = 16


@dataclass(frozen=True)
class Evaluation:
    """Scores on tasks before and after adaptation.

    Attributes:
        metric: ``"accuracy"`` in [0, 1], or ``"mse"``.
        after: The mean over tasks after adaptation.
        before: Before it.
        tasks: How many tasks.
        steps: Inner steps.
        not_finite: Tasks with a loss that is not finite; their predictions count as wrong.
        seconds: What it took.
        cut: Whether it was stopped before all tasks were done.
    """

    metric: str
    after: Interval
    before: Interval
    tasks: int
    steps: int
    not_finite: int
    seconds: float
    cut: bool = False

    def better_than(self, best: float | None) -> bool:
        """Whether the mean after adaptation beats another one; a NaN beats nothing."""
        mean = self.after.mean
        if mean != mean:
            return False
        if best is None:
            return True
        return mean > best if self.metric == "accuracy" else mean < best

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, with None for what is not finite, which JSON does not have."""
        return {
            "metric": self.metric,
            **_plain("after", self.after),
            **_plain("before", self.before),
            "tasks": self.tasks,
            "steps": self.steps,
            "not_finite": self.not_finite,
            "seconds": round(self.seconds, 3),
        }

    def __str__(self) -> str:
        return f"{self.metric} {_shown(self.metric, self.after)}"

    def before_text(self) -> str:
        """The score before adaptation, as text."""
        return _shown(self.metric, self.before)


def measure(
    built: Built,
    tasks: TaskDistribution,
    count: int,
    *,
    regression: bool,
    steps: int,
    chunk: int,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Adapts to the next tasks of a distribution, some at a time, under `no_grad`.

    Batch norms use the statistics of the batch at hand, as in training, and keep their running
    ones; dropout is off.

    Args:
        built: The learner and its loops; nothing of it changes.
        tasks: The distribution, which moves on by as many tasks.
        count: How many tasks.
        regression: Whether the score is the mean squared error; else the accuracy.
        steps: Inner steps.
        chunk: Tasks at a time, at most 16; which tasks there are does not depend on it.
        stop: Asked between chunks; True cuts the rest off.

    Returns:
        The scores.
    """
    start = time.perf_counter()
    after: list[Tensor] = []
    before: list[Tensor] = []
    finite: list[Tensor] = []
    done = 0
    with torch.no_grad(), _evaluating(built):
        for episodes in _drawn(tasks, count, chunk):
            if done and stop():
                break
            for found, k in ((after, steps), (before, 0)):
                out = built.evaluate(*episodes, steps=k)
                found.append(_scores(out.loss, out.predictions, episodes, regression).cpu())
                if k:
                    finite.append(out.finite.cpu())
            done += len(episodes.x_s)
    return Evaluation(
        "mse" if regression else "accuracy",
        interval(torch.cat(after)),
        interval(torch.cat(before)),
        done,
        steps,
        int((~torch.cat(finite)).sum()),
        time.perf_counter() - start,
        cut=done < count,
    )


def evaluate(
    checkpoint: str | Path,
    *,
    tasks: int = 600,
    steps: int | None = None,
    device: str | None = None,
    seed: int | None = None,
    root: str | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Adapts a trained learner to test tasks.

    Args:
        checkpoint: The file, or a run folder: then its ``best.pt``, or ``last.pt`` without one.
        tasks: How many tasks.
        steps: Inner steps; default: those of the training.
        device: Where; default: that of the training.
        seed: Of the test tasks; default: that of the training, which gives the training's own.
        root: Folder of the data sets; default: that of the training.
        stop: Asked between meta-batches; True cuts the rest off.

    Returns:
        The scores after and before adaptation.

    Raises:
        CheckpointError: If it cannot be used; errors of options and data are those of `Trainer`.
        ValueError: If tasks or steps are too few.

    Example:
        >>> evaluate("runs/digits").after.mean  # of docs/training.md
        0.8771333333333333
    """
    for name, value, least in (("tasks", tasks, 2), ("steps", steps, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    path = Path(checkpoint).expanduser()
    state = load_checkpoint(best_of(path))
    _check_best(path, state)
    options = {"device": device, "seed": seed, "root": root}
    given = {name: value for name, value in options.items() if value is not None}
    config = config_of(state)
    problem = sources.load(config.changed(**given), ("test",))
    built = build(config.changed(device=problem.device), problem.shape, problem.outputs,
                  problem.regression)  # fmt: skip
    load_weights(built.learner, state["learner"], "learner")
    load_weights(built.features, state["features"], "feature extractor")
    return measure(
        built,
        problem.tasks["test"],
        tasks,
        regression=problem.regression,
        steps=config.steps if steps is None else steps,
        chunk=config.meta_batch,
        stop=stop,
    )


def best_of(path: Path) -> Path:
    """The checkpoint that a run folder is evaluated by; a file is itself."""
    if not path.is_dir():
        return path
    return path / "best.pt" if (path / "best.pt").is_file() else path / "last.pt"


def _check_best(path: Path, state: dict[str, Any]) -> None:
    """Raises where a run folder has no best.pt, though there was a best validation."""
    if not path.is_dir() or (path / "best.pt").is_file():
        return
    if getattr(state["validation"], "get", lambda _: None)("best") is not None:
        raise CheckpointError(
            f"checkpoint: expected the best one in {path}, which has no best.pt; "
            f"name {path / 'last.pt'} to evaluate that"
        )


def _drawn(tasks: TaskDistribution, count: int, chunk: int) -> Iterator[Episodes]:
    """The next tasks, at most ``chunk`` at a time."""
    for start in range(0, count, DRAWN):
        episodes = tasks.sample(min(DRAWN, count - start))
        for part in zip(*(x.split(chunk) for x in episodes), strict=True):
            yield Episodes(*part)


def config_of(state: dict[str, Any]) -> TrainConfig:
    try:
        return from_mapping(state["config"], "checkpoint")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint: its config cannot be used: {error}") from None


def _scores(
    loss: Tensor | None, predictions: Tensor, episodes: Episodes, regression: bool
) -> Tensor:
    """One per task [T]: the loss, or the accuracy with what is not finite counted as wrong."""
    if regression and loss is not None:
        return loss.detach()
    right = predictions.argmax(-1) == episodes.y_q  # [T, Q]
    return (right & predictions.isfinite().all(-1)).double().mean(1)


@contextmanager
def _evaluating(built: Built) -> Iterator[None]:
    modules: list[nn.Module] = list(built.evaluate.modules())
    training = [m.training for m in modules]
    for module in modules:
        module.training = isinstance(module, _BatchNorm)
    try:
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


def _plain(name: str, value: Interval) -> dict[str, float | None]:
    finite = [x if x - x == 0 else None for x in value]
    return {name: finite[0], f"{name}_half_width": finite[1]}


def _shown(metric: str, value: Interval) -> str:
    if metric == "accuracy":
        return f"{100 * value.mean:.2f} ± {100 * value.half:.2f} %"
    return f"{value.mean:.4f} ± {value.half:.4f}"
