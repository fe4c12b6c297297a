"""A learned learning rate for every step of the inner loop, as in MAML++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkfo.functional.checks import positive
from fastkfo.optim.inner.checks import number


class PerStepLR(nn.Module):
    """`lr` of a learner: at step k, `rates[i][k]` for parameter i, learned with the learner.

    Args:
        model: the learner's model, whose parameters the rates are for.
        steps: K, how many steps there are rates for.
        init: the value of all rates at first.
        shared: whether all parameters have the same rate.

    Attributes:
        rates: `[K]` per parameter of the model, in its dtype; or, if shared, one `[K]`. Those of a
            parameter that required no gradient when they were made require none either.
        steps: K, the number of steps.
        shared: as given.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: `steps` is below 1, `init` is not finite, or the model has no parameter.

    Source: Antoniou, Edwards, Storkey, "How to Train Your MAML", ICLR 2019.

    Example:
        >>> lr = fastkfo.optim.PerStepLR(model, steps=5, init=0.01)
        >>> maml = fastkfo.algorithms.MAML(model, lr=lr)
    """

    def __init__(
        self, model: nn.Module, steps: int, init: float = 0.01, *, shared: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        positive("steps", steps)
        if not isinstance(shared, bool):
            raise TypeError(f"shared: expected a bool, got {type(shared).__name__}")
        params = list(model.parameters())
        if not params:
            raise ValueError("model: expected one with parameters, got none")
        value = number("init", init)
        self.steps, self.shared = steps, shared
        # A rate that no gradient reaches must not ask for one: DDP would wait for it.
        wanted = [p.requires_grad for p in params]
        wanted = [any(wanted)] if shared else wanted
        self.rates = nn.ParameterList(
            [
                nn.Parameter(torch.full((steps,), value, dtype=p.dtype, device=p.device), learned)
                for p, learned in zip(params[:1] if shared else params, wanted, strict=False)
            ]
        )

    def check(self, step: int) -> None:
        """Raise ValueError unless there is a rate for a step, counted from 0."""
        if step >= self.steps:
            raise ValueError(
                f"lr: expected at most {self.steps} inner steps, as many as it has rates for, "
                f"got step {step + 1}"
            )

    def check_count(self, count: int) -> None:
        """Raise ValueError unless there are rates for a model of so many parameters."""
        if not self.shared and len(self.rates) != count:
            raise ValueError(
                f"lr: expected a PerStepLR with {count} rates, one per parameter of the model, "
                f"got {len(self.rates)}"
            )

    def at(self, step: int, rates: Sequence[Tensor] | None = None) -> Any:
        """The rates of one step.

        Args:
            step: which one, counted from 0.
            rates: tensors to take them of in place of `self.rates`.

        Returns:
            A scalar tensor if shared, else a list with one per parameter.

        Raises:
            ValueError: there is no rate for this step.
        """
        self.check(step)
        rates = list(self.rates) if rates is None else rates
        return rates[0][step] if self.shared else [rate[step] for rate in rates]

    def extra_repr(self) -> str:
        """The number of steps."""
        return f"steps={self.steps}, shared={self.shared}"
