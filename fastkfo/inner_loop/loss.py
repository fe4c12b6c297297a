"""Losses of T tasks at once: one number per task."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_leaves

from fastkfo.functional.cross_entropy import check_range, cross_entropy_unchecked
from fastkfo.inner_loop.trees import map_tensors
from fastkfo.optim.recognise import global_hooks, is_plain

Loss = Callable[..., Tensor]


def per_task(loss: Loss) -> PerTask:
    """Make a loss of one task into a loss of T tasks, `(predictions, targets) → [T]`.

    Args:
        loss: maps the predictions and the targets of one task, without a task axis, to one number.
            `F.cross_entropy` and `F.mse_loss` run as kernels for all tasks; anything else under
            `torch.func.vmap` or, where that refuses, task after task.

    Returns:
        A function of predictions `[T, S, ...]` and targets `[T, S, ...]` (any pytrees of such
        tensors) that returns `[T]`, for `adapt` of a batched learner.

    Raises:
        TypeError: `loss` is not callable.
    """
    if isinstance(loss, PerTask):
        return loss
    if not callable(loss):
        raise TypeError(f"loss: expected a callable, got {type(loss).__name__}")
    return PerTask(loss)


class PerTask:
    """What `per_task` returns.

    Attributes:
        loss: the loss of one task.
        each: whether it runs task after task, since vmap refused it.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.each = False
        self._kernel = _kernel_of(loss)

    @property
    def has_kernel(self) -> bool:
        """Whether all tasks are one call."""
        return self._kernel is not None

    def fused_name(self) -> str | None:
        """Its name among the losses of `functional.inner_loop`, if it is one of them."""
        return fused_name(self.loss) if self._is_plain() else None

    def __call__(self, predictions: Any, targets: Any, *more: Any) -> Tensor:
        """The loss of every task.

        Args:
            predictions: `[T, S, ...]`, or a pytree of such tensors.
            targets: likewise; with class labels for `F.cross_entropy` `[T, S]`, integers.
            more: further arguments of the loss, likewise.

        Returns:
            `[T]`.

        Raises:
            ValueError: the loss gives a task something other than one number, targets are on
                another device than predictions, or (on the CPU) a label is out of range.
        """
        if self._kernel is not None and not more and self._is_plain():
            _check_devices(predictions, targets)
            result = self._kernel(predictions, targets)
            if result is not None:
                return result
        result = self._general(predictions, targets, *more)
        if not isinstance(result, Tensor) or result.dim() != 1:
            got = list(result.shape[1:]) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"loss: expected one number per task, got {got} for each")
        return result

    def _is_plain(self) -> bool:
        """Whether a loss that is a module still has no hooks."""
        return not isinstance(self.loss, nn.Module) or (is_plain(self.loss) and not global_hooks())

    def _general(self, *args: Any) -> Tensor:
        if not self.each:
            try:
                return vmap(self.loss, randomness="different")(*args)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                refused = error
        tasks = _tasks_of(args)
        rows = [self.loss(*map_tensors(lambda x: x[t], args)) for t in range(tasks)]  # noqa: B023
        if not self.each:
            _warn(self.loss, refused)
            self.each = True
        return torch.stack(rows)


def _check_devices(predictions: Any, targets: Any) -> None:
    both = isinstance(predictions, Tensor) and isinstance(targets, Tensor)
    if both and targets.device != predictions.device:
        raise ValueError(
            f"targets: expected device {predictions.device} as the predictions, "
            f"got {targets.device}"
        )


def _warn(loss: Loss, refused: Exception) -> None:
    name = getattr(loss, "__name__", type(loss).__name__)
    reason = str(refused).strip().splitlines()[0]
    warnings.warn(
        f"fastkfo: the loss {name} runs task after task; torch.func.vmap refuses it: {reason}",
        stacklevel=4,
    )


def _tasks_of(args: Any) -> int:
    return next(len(x) for x in tree_leaves(args) if isinstance(x, Tensor))


def fused_name(loss: Any) -> str | None:
    """Which known loss a callable exactly is: softmax cross-entropy or squares, mean or sum."""
    if loss is F.cross_entropy:
        return "cross_entropy_mean"
    if loss is F.mse_loss:
        return "mse_mean"
    if not isinstance(loss, nn.Module) or not is_plain(loss):
        return None
    reduction = getattr(loss, "reduction", None)
    if reduction not in ("mean", "sum"):
        return None
    if isinstance(loss, nn.MSELoss) and type(loss) is nn.MSELoss:
        return f"mse_{reduction}"
    if isinstance(loss, nn.CrossEntropyLoss) and type(loss) is nn.CrossEntropyLoss:
        plain = (loss.weight, loss.ignore_index, loss.label_smoothing) == (None, -100, 0.0)
        return f"cross_entropy_{reduction}" if plain else None
    return None


def _kernel_of(loss: Loss) -> Callable[[Any, Any], Tensor | None] | None:
    known = fused_name(loss)
    if known == "cross_entropy_mean":
        return _CrossEntropy()
    return _mse if known == "mse_mean" else None


def _mse(predictions: Any, targets: Any) -> Tensor | None:
    if not (isinstance(predictions, Tensor) and isinstance(targets, Tensor)):
        return None
    if predictions.shape != targets.shape or predictions.dim() < 2:
        return None
    if torch.is_autocast_enabled(predictions.device.type):
        predictions, targets = _widened(predictions), _widened(targets)
    return (predictions - targets).square().flatten(1).mean(1)


def _widened(x: Tensor) -> Tensor:
    """The tensor in float32 at least, as autocast has it for PyTorch's losses."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _CrossEntropy:
    """Cross-entropy of logits `[T, S, C]` and labels `[T, S]`; None for anything else."""

    def __init__(self) -> None:
        self._checked: tuple[Any, int, int] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without what it has seen."""
        return _CrossEntropy, ()

    def __call__(self, logits: Any, labels: Any) -> Tensor | None:
        if not (isinstance(logits, Tensor) and isinstance(labels, Tensor)):
            return None
        if logits.dim() != 3 or labels.shape != logits.shape[:2] or labels.dtype != torch.int64:
            return None
        if torch._C._are_functorch_transforms_active():
            return None
        if torch.is_autocast_enabled(logits.device.type):
            logits = _widened(logits)
        if logits.device.type != "cpu":
            return _without_a_look(logits, labels)
        if not self._in_range(labels, logits.shape[-1]):
            return None
        return cross_entropy_unchecked(logits, labels)

    def _in_range(self, labels: Tensor, classes: int) -> bool:
        """Whether labels are in range; those of every step's support are looked at once."""
        if self._checked is not None:
            seen, version, count = self._checked
            if seen() is labels and version == labels._version and count == classes:
                return True
        counted = labels != -100  # F.cross_entropy's own mark for what does not count
        if not counted.all():
            check_range("targets", labels[counted], classes)
            return False
        check_range("targets", labels, classes)
        if not labels.is_inference():
            self._checked = (weakref.ref(labels), labels._version, classes)
        return True


def _without_a_look(logits: Tensor, labels: Tensor) -> Tensor:
    """Where reading labels would synchronise: a task with one out of range is NaN."""
    classes = logits.shape[-1]
    counts = labels != -100
    wrong = (counts & ((labels < 0) | (labels >= classes))).any(1)
    safe = labels.clamp(0, classes - 1)
    log_p = torch.log_softmax(logits, -1).gather(-1, safe.unsqueeze(-1)).squeeze(-1)
    loss = -(log_p * counts).sum(1) / counts.sum(1)
    return torch.where(wrong, torch.nan, loss)
