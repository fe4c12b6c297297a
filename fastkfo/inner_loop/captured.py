"""A user's own step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkfo.inner_loop.graphs import Graph
from fastkfo.inner_loop.recorder import DEVICE, EAGER_CALLS
from fastkfo.inner_loop.trees import map_tensors


def capture(step: Callable[..., Any], example: Sequence[Tensor]) -> Captured:
    """Record what a function launches, and replay it.

    The first two calls run the function as it is; the third records it, and from then on a call
    copies its tensors to where the graph reads them and replays it. What the function does on the
    CPU (Python, random draws of Python's, printing) happens in these three calls only. Tensors that
    it reads beside its arguments are read where they lay when it was recorded: they may change in
    place (an optimizer's step, say) and not be replaced. It may call `backward`; gradients then
    have to stay allocated (`zero_grad(set_to_none=False)`, within the function or outside).

    Args:
        step: takes tensors and returns tensors, in any tuples, lists or dicts. It must not wait for
            the device.
        example: tensors like those of every call, all on one CUDA device.

    Returns:
        A function of such tensors. What it returns are copies.

    Raises:
        TypeError: `step` cannot be called, or `example` holds something that is no tensor.
        ValueError: `example` is empty or not on one CUDA device.

    Example:
        >>> replay = fastkfo.capture(training_step, (x_s, y_s, x_q, y_q))  # doctest: +SKIP
        >>> loss = replay(*batch)  # doctest: +SKIP
    """
    if not callable(step):
        raise TypeError(f"step: expected a function, got {type(step).__name__}")
    example = list(example)
    for x in example:
        if not isinstance(x, Tensor):
            raise TypeError(f"example: expected tensors, got {type(x).__name__}")
    devices = sorted({str(x.device) for x in example})
    if len(devices) != 1 or example[0].device.type != DEVICE:
        got = ", ".join(devices) or "no tensor"
        raise ValueError(f"example: expected tensors on one CUDA device, got {got}")
    return Captured(step, [(x.shape, x.dtype, x.device) for x in example])


class Captured:
    """What :func:`capture` returns."""

    def __init__(self, step: Callable[..., Any], kinds: list[Any], graph: Any = Graph) -> None:
        self._step, self._kinds, self._graph_of = step, kinds, graph
        self._calls = 0
        self._graph: Any = None

    def __call__(self, *tensors: Tensor) -> Any:
        """Run the step.

        Args:
            tensors: of the example's shapes and dtypes, on its device.

        Returns:
            What the step returns.

        Raises:
            ValueError: the tensors are not like the example.
            RuntimeError: the step cannot be recorded; the message is CUDA's own.
        """
        kinds = [(x.shape, x.dtype, x.device) for x in tensors]
        if kinds != self._kinds:
            expected = [f"{list(s)} {d} on {v}" for s, d, v in self._kinds]
            raise ValueError(
                f"tensors: expected {', '.join(expected)}, got "
                f"{', '.join([f'{list(s)} {d} on {v}' for s, d, v in kinds])}"
            )
        if self._graph is None:
            self._calls += 1
            if self._calls <= EAGER_CALLS:
                return self._graph_of.beside(self._step, tensors)
            self._record(tensors)
        with torch.no_grad():
            torch._foreach_copy_(self._inputs, list(tensors))
        self._graph.replay()
        return map_tensors(lambda x: x.detach().clone(), self._results)

    def _record(self, tensors: Sequence[Tensor]) -> None:
        inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in tensors]
        graph = self._graph_of(inputs[0].device)
        self._results = graph.record(lambda: self._step(*inputs))
        self._graph, self._inputs = graph, inputs
