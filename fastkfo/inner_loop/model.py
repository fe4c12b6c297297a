"""A model that runs for T tasks at once, each with its own parameters.

Three ways, the first that can: "chain" (known layers, no vmap), "vmap" (any forward that
`torch.func.vmap` can run; autograd is outside of it), "each" (task after task).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastkfo.inner_loop.buffers import TaskBuffers, Unbatchable
from fastkfo.inner_loop.chain import Layer, chain_of
from fastkfo.inner_loop.guards import first_line
from fastkfo.inner_loop.interception import Interception
from fastkfo.inner_loop.trees import map_tensors, stack
from fastkfo.utils import ParameterSlots, clone_module


class TaskModel:
    """Calls a module for T tasks.

    Args:
        module: a clone of the user's; between calls its slots hold what they hold now.
        tasks: T, the number of tasks.
        buffers: "shared", "frozen" or "per_task", see TaskBuffers.
        each: whether to go task after task.
        own: for each parameter, whether every task has its own; None: if it requires a gradient.
    """

    def __init__(
        self,
        module: nn.Module,
        tasks: int,
        buffers: str,
        each: bool,
        own: Sequence[bool] | None = None,
    ) -> None:
        self.module, self.tasks = module, tasks
        self.slots = ParameterSlots(module)
        self.own = [p.requires_grad for p in self.slots.params] if own is None else list(own)
        self.buffers = TaskBuffers(module, tasks, buffers)
        self.layers: list[Layer] | None = None
        self.replaced: dict[str, str] = {}  # functions that were given another form
        if not each and all(self.own):
            self.layers = chain_of(module)
        self.way = "vmap" if self.layers is None else "chain"
        if each:
            self.go_one_by_one()
        self.recurrent = any([isinstance(m, nn.RNNBase) for m in module.modules()])

    def go_one_by_one(self) -> None:
        """From now on, task after task."""
        self.way, self.layers, self.buffers.one_by_one = "each", None, True

    def __call__(self, theta: Sequence[Tensor], second_order: bool, args: Any, kwargs: Any) -> Any:
        """Call the module for every task.

        Args:
            theta: its parameters, `[T, ...]` where they are a task's own.
            second_order: whether the result is differentiated twice.
            args: of the module, any pytree; every tensor `[T, ...]`.
            kwargs: likewise.

        Returns:
            What the module returns, every tensor with a leading T.

        Raises:
            Unbatchable: it cannot run this way; parameters and buffers are as they were.
        """
        old = self.slots.params
        try:
            if self.way == "each":
                return self._one_by_one(theta, second_order, args, kwargs)
            if self.layers is not None and _is_one_batch(args, kwargs):
                outputs = self._chained(self.layers, theta, args[0])
            else:
                outputs = self._vmapped(theta, second_order, args, kwargs)
            return map_tensors(lambda x: x.contiguous(), outputs)  # as PyTorch's layers lie
        finally:
            self.slots.put(old)

    def _chained(self, layers: list[Layer], theta: Sequence[Tensor], x: Tensor) -> Tensor:
        self.slots.put(list(theta))
        for layer in layers:
            x = layer(x)
        return x

    def _vmapped(self, theta: Sequence[Tensor], second_order: bool, args: Any, kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def one(rows: list[Tensor], inputs: list[Tensor]) -> Any:
            own, filled = iter(rows), list(leaves)
            self.slots.put([next(own) if o else p for o, p in zip(self.own, theta, strict=True)])
            for k, x in zip(places, inputs, strict=True):
                filled[k] = x
            given, named = tree_unflatten(filled, spec)
            return self.module(*given, **named)

        rows = [p for p, own in zip(theta, self.own, strict=True) if own]
        try:
            with Interception(self.buffers, second_order, self.replaced):
                outputs = vmap(one, randomness="different")(rows, [leaves[k] for k in places])
            self.buffers.accept(unchanged=True)
        except torch.OutOfMemoryError:  # says nothing about the model
            self.buffers.discard()
            raise
        except Exception as error:
            self.buffers.discard()
            raise Unbatchable(f"{self._where(error)}: {first_line(error)}") from error
        return outputs

    def _one_by_one(
        self, theta: Sequence[Tensor], second_order: bool, args: Any, kwargs: Any
    ) -> Any:
        outputs = []
        try:
            intercepted = Interception(self.buffers, second_order, self.replaced)
            with self._kernels(second_order), intercepted:
                for t in range(self.tasks):
                    self.slots.put(
                        [p[t] if own else p for p, own in zip(theta, self.own, strict=True)]
                    )
                    given, named = map_tensors(lambda x: x[t], (args, kwargs))  # noqa: B023
                    with self.buffers.one_task(t):
                        outputs.append(self.module(*given, **named))
        except BaseException:
            self.buffers.discard()
            raise
        self.buffers.accept(unchanged=False)
        return stack(outputs)

    def _kernels(self, second_order: bool) -> AbstractContextManager[Any]:
        """The kernels of recurrent layers: cuDNN's have no second derivative."""
        if second_order and self.recurrent and torch.backends.cudnn.enabled:
            return torch.backends.cudnn.flags(enabled=False)
        return nullcontext()

    def _where(self, error: BaseException) -> str:
        """The innermost module that an error comes from."""
        names = {id(m): name for name, m in self.module.named_modules()}
        found, trace = self.module, error.__traceback__
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in names:
                found = owner
            trace = trace.tb_next
        name = names[id(found)]
        return type(found).__name__ + (f" ({name!r})" if name else "")


def shell_of(module: nn.Module) -> nn.Module:
    """A copy of the modules alone, to put other parameters into: it holds the same ones."""
    return clone_module(module, {p: p for p in ParameterSlots(module).params})


def _is_one_batch(args: Any, kwargs: Any) -> bool:
    return len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].dim() > 2


def check_tasks(name: str, tree: Any, tasks: int) -> None:
    """Raise ValueError unless every tensor of a pytree has T rows."""
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] != tasks):
            raise ValueError(
                f"{name}: expected {tasks} tasks on the first axis of every tensor, "
                f"got shape {list(leaf.shape)}"
            )
