"""A learnable update: one transform per parameter, applied to the gradients of a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from fastkfo.optim.differentiate import gradients
from fastkfo.optim.fused import transform_gradients


class ParameterUpdate(nn.Module):
    """Computes updates from a loss: `transform_i(∇_i loss)` for each parameter i.

    Args:
        parameters: the parameters that are to be updated.
        transform: called with each parameter; returns a module, or None for the plain gradient.

    Raises:
        TypeError: `transform` is not callable.
        ValueError: `transform` returned neither a module nor None.

    The state dict's keys are `transforms_modules.{i}.*`, where i counts the parameters that have a
    transform.
    """

    def __init__(
        self, parameters: Iterable[Tensor], transform: Callable[[Tensor], nn.Module | None]
    ) -> None:
        super().__init__()
        if not callable(transform):
            raise TypeError(f"transform: expected a callable, got {type(transform).__name__}")
        modules: list[nn.Module] = []
        self.transforms_indices: list[int | None] = []
        for i, param in enumerate(parameters):
            made = transform(param)
            if made is None:
                self.transforms_indices.append(None)
            elif isinstance(made, nn.Module):
                self.transforms_indices.append(len(modules))
                modules.append(made)
            else:
                raise ValueError(
                    f"transform: expected a Module or None for parameter {i}, "
                    f"got {type(made).__name__}"
                )
        self.transforms_modules = nn.ModuleList(modules)

    def transforms(self) -> list[nn.Module | None]:
        """The transform of each parameter, or None."""
        modules = list(self.transforms_modules._modules.values())
        return [None if i is None else modules[i] for i in self.transforms_indices]

    def forward(
        self,
        loss: Tensor,
        parameters: Iterable[Tensor],
        create_graph: bool = False,
        retain_graph: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
    ) -> list[Tensor | None]:
        """The updates for a loss; to be subtracted, times a learning rate.

        Args:
            loss: a scalar.
            parameters: the tensors to differentiate in, as many as there were at construction.
            create_graph: whether the gradients are differentiable themselves.
            retain_graph: whether the loss may be differentiated once more.
            allow_unused: whether a parameter that the loss does not depend on is given None.
            allow_nograd: whether a parameter that requires no gradient is given None.

        Returns:
            One update of its parameter's shape, or None, per parameter.

        Raises:
            TypeError: `loss` is no tensor, or dtypes do not match.
            ValueError: `loss` is not a scalar or has no graph, the number of parameters is not
                that at construction, or a transform returned the wrong shape.
            RuntimeError: autograd's own, with the option that would help.
        """
        parameters = list(parameters)
        if len(parameters) != len(self.transforms_indices):
            raise ValueError(
                f"parameters: expected {len(self.transforms_indices)}, one per transform, "
                f"got {len(parameters)}"
            )
        grads = gradients(loss, parameters, create_graph, retain_graph, allow_unused, allow_nograd)
        return transform_gradients(self.transforms(), grads)
