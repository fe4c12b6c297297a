"""What learners have in common of inner optimizers, clipping and learning rates per step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastkfo.optim.inner import START, OptimizerState, PerStepLR
from fastkfo.optim.inner.update import InnerUpdate, inner_update
from fastkfo.utils import clone_module

NAMES = ("inner_optimizer", "clip_grad_norm", "clip_grad_value")
PLAIN = InnerUpdate()


class InnerOptions:
    """The options, and the state that goes from one `adapt` to the next.

    An option that was not given is no attribute, so that it hides none of the model's.
    """

    lr: Any
    module: nn.Module
    _modules: dict[str, Any]
    _parameters: dict[str, Any]
    _inner_state: OptimizerState = START
    _shares_rates: bool = False  # whether `lr` is that of the learner that this is a clone of

    def __getattr__(self, attr: str) -> Any:
        """The attribute; of an option that was not given, the model's or else None."""
        modules = self.__dict__.get("_modules")
        if modules is not None and attr in modules:  # `module`, at every step: the short way
            return modules[attr]
        try:
            return super().__getattr__(attr)  # type: ignore[misc]
        except AttributeError:
            if attr in NAMES:
                return None
            raise

    def _set_options(self, *values: Any) -> None:
        """Keep the options that are given, in the order of `NAMES`."""
        for name, value in zip(NAMES, values, strict=True):
            if value is not None:
                setattr(self, name, value)

    def _given_options(self) -> dict[str, Any]:
        """The options that this learner has, wherever torch.nn.Module has put them."""
        own, modules, params = vars(self), self._modules, self._parameters
        found = {}
        for name in NAMES:  # for every clone and step
            if name in own or name in modules or name in params:
                found[name] = getattr(self, name)
        return found

    def _inner_options(self) -> dict[str, Any]:
        """What a clone takes over."""
        options = self._given_options()
        options["_inner_state"] = self._inner_state
        options["_shares_rates"] = True
        return options

    def _inner_update(self) -> InnerUpdate:
        """What is done with gradients."""
        given = self._given_options()
        if not given:
            return PLAIN
        return inner_update(*[given.get(name) for name in NAMES])

    def _checked_lr(self) -> Any:
        """`lr`; ValueError if it is not for as many parameters as the model has by now."""
        if isinstance(self.lr, PerStepLR):
            self.lr.check_count(len(list(self.module.parameters())))
        return self.lr

    def _rate(self, count: int) -> Any:
        """The rate or rates of the step to come.

        Args:
            count: how many parameters the model has.

        Returns:
            As `PerStepLR.at`, or `lr` itself.

        Raises:
            ValueError: there is none for the step, or not one per parameter.
        """
        lr = self.lr
        if not isinstance(lr, PerStepLR):
            return lr
        lr.check_count(count)
        return lr.at(self._inner_state.step)

    def _let_go(self, keep_requires_grad: bool) -> None:
        """Before the parameters are detached: the state too, and a clone gets rates of its own."""
        lr, own = self.lr, vars(self)
        own["_inner_state"] = self._inner_state.detached()
        if not self._shares_rates:
            return
        with torch.enable_grad():
            if isinstance(lr, PerStepLR):
                self._modules["lr"] = clone_module(lr)
            elif isinstance(lr, nn.Parameter):
                copy = self._parameters["lr"] = lr.clone()
                if self._modules.get("diff_sgd") is not None:  # has the same rate
                    self._modules["diff_sgd"] = clone_module(self.diff_sgd, {lr: copy})
        own["_shares_rates"] = False

    def extra_repr(self) -> str:
        """The options that are given."""
        given = self._given_options().items()
        return ", ".join([f"{name}={value!r}" for name, value in given if value is not None])
