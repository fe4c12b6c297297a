"""The options of an inner loop, checked."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkfo.functional import checks
from fastkfo.inner_loop.guards import sent
from fastkfo.inner_loop.inputs import Batch
from fastkfo.inner_loop.loss import per_task
from fastkfo.inner_loop.step import Rule
from fastkfo.optim.inner import PerStepLR
from fastkfo.utils import ParameterSlots


def rule_of(learner: Any, options: dict[str, Any]) -> Rule:
    """How a learner adapts, with some options in place of its own."""
    rule: Rule = learner.rule(**options)
    return rule


def learner_options(learner: Any, given: dict[str, Any]) -> dict[str, bool]:
    """The options that are given.

    Args:
        learner: the learner.
        given: options by name; None stands for the learner's own.

    Returns:
        Those that are not None.

    Raises:
        TypeError: it is no learner, or an option is no bool.
        ValueError: the learner has no such option.
    """
    rule = getattr(type(learner), "rule", None)
    if not isinstance(learner, nn.Module) or rule is None:
        raise TypeError(
            f"learner: expected a GBML, a MAML or a MetaSGD, got {type(learner).__name__}"
        )
    known = inspect.signature(rule).parameters
    for name, value in given.items():
        if value is None:
            continue
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool or None, got {type(value).__name__}")
        if name not in known and value:
            kind = type(learner).__name__
            raise ValueError(f"{name}: expected None, as {kind} has no such option")
    return {name: value for name, value in given.items() if value is not None and name in known}


def check_steps(rule: Rule, steps: int, all_of_them: bool) -> None:
    """Refuse a number of steps that a learner's rates are not for.

    Args:
        rule: how the learner adapts.
        steps: K, the number of steps.
        all_of_them: whether fewer steps than rates are an error: the last would not be learned.

    Raises:
        ValueError: a step has no rate, or a rate no step.
    """
    if not isinstance(rule.lr, PerStepLR):
        return
    left = max(0, rule.lr.steps - rule.state.step)
    if steps > left or (all_of_them and steps < left):
        expected = f"{'' if all_of_them else 'at most '}{left}"
        raise ValueError(
            f"steps: expected {expected}, as lr has a rate for each of {left} steps, got {steps}"
        )


def overridden(learner: nn.Module) -> str | None:
    """Why a learner of a class of the user's own is known by its methods alone, or None."""
    base = next(c for c in type(learner).__mro__ if c.__module__.startswith("fastkfo."))
    for name in ("adapt", "clone", "forward"):
        if getattr(type(learner), name) is not getattr(base, name):
            return f"{type(learner).__name__} has a method {name!r} of its own"
    return None


def params_of(module: nn.Module | None) -> list[Tensor]:
    """The parameters of a module, each once."""
    return [] if module is None else ParameterSlots(module).params


def as_loss(name: str, loss: Any) -> Any:
    """The loss for tasks; or the module itself, if it has parameters, which are learned then."""
    if isinstance(loss, nn.Module) and next(loss.parameters(), None) is not None:
        return loss
    if not callable(loss):
        raise TypeError(f"{name}: expected a callable, got {type(loss).__name__}")
    return per_task(loss)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError unless a value is one of the choices."""
    if not any([value is choice or value == choice for choice in choices]):
        raise ValueError(f"{name}: expected one of {tuple(choices)}, got {value!r}")


def check_weights(weights: Any, steps: int, y_q: Any, batch: Batch) -> Tensor | None:
    """The weights of the steps' query losses as a tensor, or None.

    Args:
        weights: numbers, or a tensor that may be learned.
        steps: K, the number of steps.
        y_q: the query targets, without which there is nothing to weigh.
        batch: tells the device.

    Returns:
        `[K]`, or None.

    Raises:
        TypeError: a weight is no number.
        ValueError: there is not one weight per step, or nothing to weigh.
    """
    if weights is None:
        return None
    if y_q is None:
        raise ValueError("step_weights: expected None without y_q, got weights")
    like = batch.tensors()[0]
    if not isinstance(weights, Tensor):
        if not isinstance(weights, Sequence):
            got = type(weights).__name__
            raise TypeError(f"step_weights: expected a list of numbers or a tensor, got {got}")
        weights = _stacked(weights, like.device)
    checks.floating_tensor("step_weights", weights)
    if weights.shape != (steps,) or steps == 0:
        raise ValueError(
            f"step_weights: expected one weight for each of {steps} steps (at least one), "
            f"got shape {list(weights.shape)}"
        )
    return weights


def _stacked(weights: Sequence[Any], device: torch.device) -> Tensor:
    """Numbers, or scalar tensors that may be learned, as one tensor."""
    for w in weights:
        if not isinstance(w, Tensor):
            checks.finite("step_weights", w)
        elif w.numel() != 1:
            raise ValueError(f"step_weights: expected scalars, got shape {list(w.shape)}")
    if any([isinstance(w, Tensor) for w in weights]):
        rows = [w if isinstance(w, Tensor) else float(w) for w in weights]
        return torch.stack([sent(w, device, torch.float64).reshape(()) for w in rows])
    return sent([float(w) for w in weights], device, torch.float64)


def refused_by_clone(learner: Any, options: dict[str, Any]) -> str | None:
    """The first of the options that a learner's `clone` does not take, or None."""
    known = inspect.signature(type(learner).clone).parameters
    if any([p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()]):
        return None
    return next((name for name in options if name not in known), None)
