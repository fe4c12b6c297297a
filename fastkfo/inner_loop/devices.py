"""Where tensors lie: an inner loop runs on one device, and what lies on another is named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastkfo.inner_loop.inputs import Batch
from fastkfo.inner_loop.run import Settings


def device_of(tensors: Iterable[Tensor]) -> torch.device | None:
    """The one device of all tensors; None if they are on several: such a model moves its inputs."""
    devices = {x.device for x in tensors}
    return devices.pop() if len(devices) == 1 else None


def check_tree(name: str, tree: Any, device: torch.device | None, of: str) -> None:
    """Raise ValueError for a tensor on another device.

    Integers within a tuple or dict may lie elsewhere: lengths of sequences, say, have to be on the
    CPU.

    Args:
        name: of the argument.
        tree: a tensor, or a pytree.
        device: where it is expected; None: anywhere.
        of: what lies there, in words.

    Raises:
        ValueError: a tensor is elsewhere.
    """
    if device is None:
        return
    for x in [tree] if isinstance(tree, Tensor) else tree_leaves(tree):
        if not isinstance(x, Tensor) or x.device == device:
            continue
        if x is tree or x.is_floating_point():
            raise ValueError(f"{name}: expected device {device} as {of}, got {x.device}")


def check_devices(
    settings: Settings, batches: Sequence[Batch], weights: Tensor | None = None
) -> None:
    """Raise ValueError unless all of an inner loop lies on one device, before it begins.

    Args:
        settings: the learner, the features and the losses.
        batches: the tasks.
        weights: of the query losses after every step; on the CPU they may be, too.

    Raises:
        ValueError: something lies on another device than the learner's parameters.
    """
    device = device_of(settings.rule.module.parameters())
    modules = {"features": settings.features, "loss": settings.loss}
    if settings.query_loss is not settings.loss:
        modules["query_loss"] = settings.query_loss
    for name, module in modules.items():
        if isinstance(module, nn.Module):
            check_tree(name, _of_one_device(module), device, _LEARNER)
    moves = settings.features is not None and _is_spread(settings.features)
    for batch in batches:
        for name, tree in batch._asdict().items():
            if not (moves and name in ("x_s", "x_q")):
                check_tree(name, tree, device, _LEARNER)
    if weights is not None and weights.device.type != "cpu":
        check_tree("step_weights", weights, device, _LEARNER)


def _is_spread(module: nn.Module) -> bool:
    return len({p.device for p in module.parameters()}) > 1


def _of_one_device(module: nn.Module) -> list[Tensor]:
    return [] if _is_spread(module) else list(module.parameters())


_LEARNER = "the learner's parameters"
