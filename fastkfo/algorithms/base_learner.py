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
    _model_at = "its `module`"  # what fastkfo.nn tells who passes the learner instead

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self.module = module  # type: ignore[assignment]

    @classmethod
    def _for_task(cls, module: nn.Module, **attributes: Any) -> Any:
        """Make a learner around a cloned module, without the checks of `__init__`.

        Runs once per task: the checks and nn.Module's own attribute writes would cost more than
        the clones. `clone_module` has made sure that nothing is compiled.

        Args:
            module: the clone.
            attributes: the learner's other attributes.

        Returns:
            The learner.
        """
        learner = cls.__new__(cls)
        nn.Module.__init__(learner)
        learner._modules["module"] = module
        for name, value in attributes.items():
            if isinstance(value, (nn.Parameter, nn.Module)):
                setattr(learner, name, value)
            else:
                vars(learner)[name] = value
        return learner

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
