"""A user's own step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkfo.inner_loop.graphs import Graph, Turns, modes, without_cached_casts
from fastkfo.inner_loop.guards import first_line
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
        A function of such tensors. What it returns are copies, without a graph of autograd's.

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
        self._step, self._kinds = step, kinds
        self._calls = 0
        self._device = kinds[0][2]
        self._graph, self._turns = graph(self._device), Turns(self._device)
        self._inputs: list[Tensor] = []

    def __call__(self, *tensors: Tensor) -> Any:
        """Run the step.

        Args:
            tensors: of the example's shapes and dtypes, on its device.

        Returns:
            What the step returns, as copies without a graph.

        Raises:
            TypeError: something is no tensor.
            ValueError: the tensors are not like the example.
            RuntimeError: the step cannot be recorded (the message has the reason; the next call
                tries again), or grad mode, autocast or a switch of PyTorch's is not what it was
                when it was recorded.
        """
        for x in tensors:
            if not isinstance(x, Tensor):
                raise TypeError(f"tensors: expected tensors, got {type(x).__name__}")
        kinds = [(x.shape, x.dtype, x.device) for x in tensors]
        if kinds != self._kinds:
            expected, got = (
                ", ".join([f"{list(s)} {d} on {v}" for s, d, v in x]) for x in (self._kinds, kinds)
            )
            raise ValueError(f"tensors: expected {expected}, got {got}")
        with self._turns.taken():
            if not self._inputs:
                self._calls += 1
                if self._calls <= EAGER_CALLS:
                    with without_cached_casts(self._device):
                        return _copied(self._graph.beside(self._step, tensors))
                self._record(tensors)
            if modes(self._device) != self._modes:
                raise RuntimeError(
                    "capture: grad mode, autocast or a switch of PyTorch's changed since the step "
                    "was recorded"
                )
            with torch.no_grad():
                torch._foreach_copy_(self._inputs, list(tensors))
            self._graph.replay()
            return _copied(self._results)

    def _record(self, tensors: Sequence[Tensor]) -> None:
        inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in tensors]
        try:
            with without_cached_casts(self._device):
                self._results = self._graph.record(lambda: self._step(*inputs))
        except Exception as error:
            reason = first_line(error)
            raise RuntimeError(f"capture: the step cannot be recorded: {reason}") from error
        self._inputs, self._modes = inputs, modes(self._device)


def _copied(results: Any) -> Any:
    return map_tensors(lambda x: x.detach().clone(), results)
