"""Regression and classification tasks made from a few random numbers each."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkfo.tasks import checks
from fastkfo.tasks.distribution import Episodes, TaskDistribution

__all__ = ["BinaryClassificationTasks", "LinearRegressionTasks", "SinusoidTasks"]


class _Toy(TaskDistribution):
    """Tasks with ``classes * (shots + queries)`` points that are drawn alike."""

    def __init__(
        self,
        shots: int,
        queries: int,
        *,
        classes: int = 1,
        seed: int,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        checks.count("shots", shots)
        checks.count("queries", queries)
        super().__init__(seed=seed, device=device)
        self.shots, self.queries = shots, queries
        self._support, self._points = classes * shots, classes * (shots + queries)
        self.dtype = checks.floating("dtype", dtype)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, dtype=self.dtype, device=self.device)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=self.dtype, device=self.device)

    def _noisy(self, y: Tensor, std: float) -> Tensor:
        return y.add_(self._normal(*y.shape), alpha=std) if std > 0 else y

    def _parted(self, x: Tensor, y: Tensor) -> Episodes:
        """Parts of ``[T, points, ...]``, of which the first are the support."""
        s = self._support
        return Episodes(*(t.contiguous() for t in (x[:, :s], y[:, :s], x[:, s:], y[:, s:])))


class SinusoidTasks(_Toy):
    """Sine waves: ``y = a sin(x - p) + noise``, with an amplitude a and a phase p per task.

    Inputs and targets are ``[T, S, 1]`` and ``[T, Q, 1]``.

    Args:
        shots: Support points, S.
        queries: Query points, Q.
        amplitude: a is uniform between these two.
        phase: p is uniform between these two.
        inputs: x is uniform between these two.
        noise: Standard deviation of Gaussian noise on support and query targets.
        seed: Seeds this object's own generator; the global one is left alone.
        dtype: Of everything returned. Default: ``torch.get_default_dtype()``.
        device: Of everything returned, and where it is drawn. Default: the CPU.

    Raises:
        TypeError: If an option has the wrong type, or dtype is no floating dtype.
        ValueError: If a count is below 1, an interval is not one, or noise is negative.

    Example:
        >>> tasks = SinusoidTasks(shots=10, queries=10, seed=0)
        >>> tasks.sample(32).y_q.shape
        torch.Size([32, 10, 1])

    Source:
        C. Finn, P. Abbeel, S. Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
        Networks", ICML 2017, section 5.1, which the defaults are.
    """

    def __init__(
        self,
        shots: int = 10,
        queries: int = 10,
        *,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        inputs: tuple[float, float] = (-5.0, 5.0),
        noise: float = 0.0,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        checks.interval("amplitude", amplitude)
        checks.interval("phase", phase)
        checks.interval("inputs", inputs)
        checks.at_least_zero("noise", noise)
        super().__init__(shots, queries, seed=seed, dtype=dtype, device=device)
        self.amplitude, self.phase, self.inputs, self.noise = amplitude, phase, inputs, noise

    def _draw(self, tasks: int) -> Episodes:
        u = self._uniform(tasks, self._points + 2, 1)
        a, p = _between(u[:, :1], self.amplitude), _between(u[:, 1:2], self.phase)
        x = _between(u[:, 2:], self.inputs)
        return self._parted(x, self._noisy((x - p).sin_().mul_(a), self.noise))


class LinearRegressionTasks(_Toy):
    """Linear maps: ``y = W x + b + noise``, with W and b per task.

    x is standard normal; W's entries have variance ``1 / inputs`` and b's variance 1, so that each
    of the two parts of y has variance 1. Inputs are ``[T, S, inputs]``, targets
    ``[T, S, outputs]``.

    Args:
        shots: Support points, S.
        queries: Query points, Q.
        inputs: Length of x.
        outputs: Length of y.
        bias: Whether there is a b.
        noise: Standard deviation of Gaussian noise on support and query targets.
        seed: Seeds this object's own generator; the global one is left alone.
        dtype: Of everything returned. Default: ``torch.get_default_dtype()``.
        device: Of everything returned, and where it is drawn. Default: the CPU.

    Raises:
        TypeError: If an option has the wrong type, or dtype is no floating dtype.
        ValueError: If a count is below 1, or noise is negative.

    Example:
        >>> LinearRegressionTasks(5, 5, inputs=3).sample(16).x_s.shape
        torch.Size([16, 5, 3])

    Source:
        The kind of task on which S. Arnold, S. Iqbal, F. Sha, "When MAML Can Adapt Fast and How to
        Assist When It Cannot", AISTATS 2021, compare shallow and deep linear models. Their code for
        it is not published: sizes and variances here are fastkfo's own.
    """

    def __init__(
        self,
        shots: int = 10,
        queries: int = 10,
        *,
        inputs: int = 1,
        outputs: int = 1,
        bias: bool = True,
        noise: float = 0.0,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        checks.count("inputs", inputs)
        checks.count("outputs", outputs)
        checks.flag("bias", bias)
        checks.at_least_zero("noise", noise)
        super().__init__(shots, queries, seed=seed, dtype=dtype, device=device)
        self.inputs, self.outputs, self.bias, self.noise = inputs, outputs, bias, noise

    def _draw(self, tasks: int) -> Episodes:
        x = self._normal(tasks, self._points, self.inputs)
        w = self._normal(tasks, self.inputs, self.outputs).mul_(self.inputs**-0.5)
        y = x @ w
        if self.bias:
            y += self._normal(tasks, 1, self.outputs)
        return self._parted(x, self._noisy(y, self.noise))


class BinaryClassificationTasks(_Toy):
    """The two sides of a random hyperplane through the origin: ``y = [⟨w, x⟩ > 0]``.

    w's direction is uniform and x is standard normal. Inputs are ``[T, 2 shots, inputs]``.

    Args:
        shots: Support points per class, so that S = 2 shots.
        queries: Query points per class, so that Q = 2 queries.
        inputs: Length of x.
        balanced: Whether each class has exactly ``shots`` and ``queries`` points, class 0 first.
            Points on the wrong side are reflected at the hyperplane, which leaves them distributed
            as x is on the right side. If False, labels are as the points fall, in random order: a
            task may hold one class only.
        float_labels: If False, labels are int64 ``[T, S]``, for cross-entropy over two logits; if
            True, 0.0 and 1.0 of dtype ``dtype``, ``[T, S, 1]``, for a loss on one logit.
        seed: Seeds this object's own generator; the global one is left alone.
        dtype: Of the inputs. Default: ``torch.get_default_dtype()``.
        device: Of everything returned, and where it is drawn. Default: the CPU.

    Raises:
        TypeError: If an option has the wrong type, or dtype is no floating dtype.
        ValueError: If a count is below 1.

    Example:
        >>> BinaryClassificationTasks(5, 5, inputs=10).sample(16).y_s.shape
        torch.Size([16, 10])

    Source:
        The kind of task on which S. Arnold, S. Iqbal, F. Sha, "When MAML Can Adapt Fast and How to
        Assist When It Cannot", AISTATS 2021, compare logistic regression with and without linear
        layers after it. Their code for it is not published: sizes here are fastkfo's own.
    """

    def __init__(
        self,
        shots: int = 5,
        queries: int = 5,
        *,
        inputs: int = 10,
        balanced: bool = True,
        float_labels: bool = False,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        checks.count("inputs", inputs)
        checks.flag("balanced", balanced)
        checks.flag("float_labels", float_labels)
        super().__init__(shots, queries, classes=2, seed=seed, dtype=dtype, device=device)
        self.inputs, self.balanced, self.float_labels = inputs, balanced, float_labels
        y = [torch.arange(2).repeat_interleave(n) for n in (shots, queries)]
        self._labels = torch.cat(y).to(self.device)[None, :, None]  # [1, S + Q, 1]

    def _draw(self, tasks: int) -> Episodes:
        x = self._normal(tasks, self._points, self.inputs)
        w = F.normalize(self._normal(tasks, 1, self.inputs), dim=2)
        margin = (x * w).sum(2, keepdim=True)  # [T, S + Q, 1]
        y = margin > 0
        if self.balanced:
            wrong = y != self._labels
            x -= 2 * margin * wrong * w
            y = self._labels.expand(tasks, -1, -1)
        return self._parted(x, y.to(self.dtype) if self.float_labels else y.squeeze(2).long())


def _between(u: Tensor, interval: tuple[float, float]) -> Tensor:
    """Uniform numbers of [0, 1) as ones of the interval."""
    low, high = interval
    return u * (high - low) + low
