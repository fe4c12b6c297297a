"""What wraps a module and passes for it."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastkfo.utils import check_not_compiled


class BaseLearner(nn.Module):
    """A module around another; attributes it lacks are looked up on the wrapped one.

    Args:
        module: the module to wrap.
    """

    module: nn.Module

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self.module = module  # type: ignore[assignment]

    def __getattr__(self, attr: str) -> Any:
        """The attribute of the learner, else that of the wrapped module."""
        try:
            return super().__getattr__(attr)
        except AttributeError:
            return getattr(self.__dict__["_modules"]["module"], attr)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped module."""
        return self.module(*args, **kwargs)


def check_module(name: str, module: object) -> None:
    """Raise TypeError unless `module` is a module of plain PyTorch."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {type(module).__name__}")
    check_not_compiled(module, name)
