"""What task distributions share: what they yield, their own generator, how they are resumed."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from fastkfo.tasks import checks

__all__ = ["Episodes", "TaskDistribution"]


class Episodes(NamedTuple):
    """A meta-batch of T tasks with S support and Q query samples each.

    Attributes:
        x_s: Support inputs, ``[T, S, ...]``.
        y_s: Support targets: labels ``[T, S]``, int64 in ``[0, ways)``, or values ``[T, S, ...]``.
        x_q: Query inputs, ``[T, Q, ...]``.
        y_q: Query targets, as ``y_s``.
    """

    x_s: torch.Tensor
    y_s: torch.Tensor
    x_q: torch.Tensor
    y_q: torch.Tensor


class TaskDistribution(abc.ABC):
    """A distribution over tasks that yields whole meta-batches, on the device.

    A subclass has ``_draw(tasks)`` and takes all its randomness from ``self._generator``. The same
    seed on the same kind of device gives the same tasks; the global generator is left alone.

    Args:
        seed: Seeds the generator; from 0.
        device: Of everything returned. Default: the CPU.
        generator: Where the generator lives. Default: on ``device``.

    Raises:
        TypeError: If seed is no integer, or device no device.
        ValueError: If seed is negative or 2**63 or more, or PyTorch does not see the device.

    Example:
        >>> tasks = SinusoidTasks(shots=10, queries=10, seed=0)
        >>> inner_loop(*tasks.sample(32)).loss.mean().backward()
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        generator: torch.device | str | None = None,
    ) -> None:
        checks.seed("seed", seed)
        self.device = checks.device("device", device)
        self._generator = torch.Generator(self.device if generator is None else generator)
        self._generator.manual_seed(seed)

    @abc.abstractmethod
    def _draw(self, tasks: int) -> Episodes:
        """The next tasks; ``tasks`` is at least 1."""

    def sample(self, tasks: int) -> Episodes:
        """Draws the next ``tasks`` tasks.

        Args:
            tasks: How many, T.

        Returns:
            The tasks, on ``device``. Labelled samples are grouped by class: 0, 0, …, 1, 1, …

        Raises:
            TypeError: If tasks is no integer.
            ValueError: If tasks is not positive.
        """
        checks.count("tasks", tasks)
        return self._draw(tasks)

    def state_dict(self) -> dict[str, Any]:
        """What a training that is resumed needs to draw the same tasks, bit for bit.

        Returns:
            The generator's state (uint8, on the CPU) and the kind of device it belongs to;
            ``torch.load(..., weights_only=True)`` reads both. The data are not in it.
        """
        state = self._generator.get_state()
        return {"generator": state, "device": self._generator.device.type}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from where ``state_dict`` was taken.

        Args:
            state_dict: Of a distribution with the same options.

        Raises:
            TypeError: If it is no mapping, or its generator's state no uint8 tensor.
            ValueError: If its keys are others, or its generator is of another kind of device or
                of no kind at all. The distribution is then as it was.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
        if set(state_dict) != {"generator", "device"}:
            raise ValueError(
                f"state_dict: expected the keys generator and device, got {sorted(state_dict)}"
            )
        state, own = state_dict["generator"], self._generator.device.type
        if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8:
            found = getattr(state, "dtype", type(state).__name__)
            raise TypeError(f"state_dict['generator']: expected a uint8 tensor, got {found}")
        if state_dict["device"] != own:
            raise ValueError(
                f"state_dict['device']: expected {own!r}, whose generator draws these tasks, got "
                f"{state_dict['device']!r}"
            )
        expected = self._generator.get_state().shape
        if state.shape != expected:
            raise ValueError(
                f"state_dict['generator']: expected shape {list(expected)}, got {list(state.shape)}"
            )
        try:
            self._generator.set_state(state.cpu())  # torch.load may have put it on a GPU
        except RuntimeError as error:
            raise ValueError(f"state_dict['generator']: expected a state, got {error}") from error
