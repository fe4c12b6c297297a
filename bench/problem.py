"""One thing to compute: a workload, a method, sizes, dtype and device, and a state to start from.

Every peer computes the same: the sum over tasks of the query losses after K inner steps, and its
gradient for every learned tensor. A gradient is a dict by name; the names are those of
learn2learn's `named_parameters()`, with `features.` before those of a feature extractor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastkfo
from bench.workloads import METHODS, WORKLOADS, Tasks, Workload
from fastkfo.reference.loop import factors_of
from fastkfo.reference.transforms import Phi, flatten, like

Gradient = dict[str, Tensor]

PREFIX = "features."


@dataclass(frozen=True)
class Problem:
    """What is computed.

    Attributes:
        workload: a name in WORKLOADS.
        method: one of METHODS.
        tasks: T.
        steps: K.
        width: the learner's width.
        dtype: float32 or float64.
        device: "cpu" or "cuda".
    """

    workload: str
    method: str
    tasks: int
    steps: int
    width: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @classmethod
    def named(cls, workload: str, method: str, **sizes: Any) -> Problem:
        """The problem with the workload's own sizes, but for those that are given and not None.

        Raises:
            ValueError: The workload or the method is unknown.
        """
        known("workload", workload, WORKLOADS)
        known("method", method, METHODS)
        own = WORKLOADS[workload]
        given = {name: value for name, value in sizes.items() if value is not None}
        return cls(
            workload, method, **{"tasks": own.tasks, "steps": own.steps, "width": own.width} | given
        )

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem, with the same numbers, in another precision."""
        return replace(self, dtype=dtype)

    @property
    def of(self) -> Workload:
        return WORKLOADS[self.workload]

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        return self.of.loss

    @property
    def lr(self) -> float:
        return self.of.lr

    @property
    def adapt_transform(self) -> bool:
        return self.method == "kfo-adapt"

    @property
    def psd(self) -> bool:
        return True  # KroneckerTransform's default, and Meta-KFO's

    @property
    def label(self) -> str:
        return f"{self.workload} {self.method} T{self.tasks} K{self.steps} w{self.width}"

    @cached_property
    def data(self) -> Tasks:
        """The meta-batch, drawn from the seed."""
        generator = torch.Generator().manual_seed(0)
        return Tasks(*(self._place(t) for t in self.of.draw(self.tasks, generator, self.width)))

    def learner(self, l2l: Any) -> nn.Module:
        """GBML, MAML or MetaSGD of one library, every parameter the same for every library.

        All are moved off their initial values: at the identity a transposed factor does not show.
        """
        model = _seeded(self.of.learner, self.width)
        algorithms = l2l.algorithms
        if self.method == "maml":
            made = algorithms.MAML(model, lr=self.lr)
        elif self.method == "meta-sgd":
            made = algorithms.MetaSGD(model, lr=self.lr)
        elif self.method == "meta-curvature":
            made = algorithms.GBML(model, l2l.optim.MetaCurvatureTransform, lr=self.lr)
        else:
            transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)
            made = algorithms.GBML(
                model, transform, lr=self.lr, adapt_transform=self.adapt_transform
            )
        return self._place(_moved(made.double()))

    def features(self) -> nn.Module | None:
        """The feature extractor, or None."""
        if self.of.features is None:
            return None
        return self._place(_moved(_seeded(self.of.features, self.width).double()))

    def _place(self, thing: Any) -> Any:
        if isinstance(thing, Tensor) and not thing.is_floating_point():
            return thing.to(self.device)
        return thing.to(self.device, self.dtype)


class Functional:
    """A problem for peers that want functions of plain dicts, not modules.

    Attributes:
        module: the adapted module.
        features: the feature extractor, or None.
        state: every learned tensor by its name: the parameters of the two and of the transforms.
        lr: of the inner step. 1 where the transform holds the rates (Meta-SGD).
    """

    def __init__(self, problem: Problem) -> None:
        learner: Any = problem.learner(fastkfo)
        self.features = problem.features()
        self.module: nn.Module = learner.module
        self.lr = 1.0 if problem.method == "meta-sgd" else problem.lr
        named = dict(named_parameters(self.features, learner))
        name_of = {id(p): name for name, p in named.items()}
        self._theta = {n: name_of[id(p)] for n, p in self.module.named_parameters()}
        self._phi: dict[str, tuple[Phi, list[str]]] = {}
        if problem.method != "maml":
            for name, phi in factors_of(learner).items():
                self._phi[name] = (phi, [name_of[id(t)] for t in flatten([phi])])
        self._psi = [name for name in named if name.startswith(PREFIX)]
        self.state: dict[str, Tensor] = dict(named)

    def theta(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The module's parameters by the module's names."""
        return {name: state[full] for name, full in self._theta.items()}

    def phi(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Every parameter's transform, by the module's names."""
        return {
            name: like(kind, iter([state[full] for full in names]))
            for name, (kind, names) in self._phi.items()
        }

    def gradient(
        self, theta: Mapping[str, Tensor], phi: Mapping[str, Phi], psi: Mapping[str, Tensor]
    ) -> Gradient:
        """The gradient by full names, of one in three parts: the way back."""
        found = {self._theta[name]: g for name, g in theta.items()}
        for name, (_, names) in self._phi.items():
            found |= zip(names, flatten([phi[name]]), strict=True)
        return found | {PREFIX + name: g for name, g in psi.items()}

    def psi(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The feature extractor's parameters by its names."""
        return {name.removeprefix(PREFIX): state[name] for name in self._psi}


def named_parameters(
    features: nn.Module | None, learner: nn.Module
) -> Iterator[tuple[str, nn.Parameter]]:
    """Every learned tensor and its name in a gradient."""
    if features is not None:
        yield from features.named_parameters(prefix=PREFIX.rstrip("."))
    yield from learner.named_parameters()


class Learned:
    """The learned tensors, looked up once: walking modules would cost more than small problems.

    Args:
        features: the feature extractor, or None.
        learner: the learner.
    """

    def __init__(self, features: nn.Module | None, learner: nn.Module) -> None:
        self._tensors = list(named_parameters(features, learner))

    def clear(self) -> None:
        """Lets go of what lies in `.grad`."""
        for _, p in self._tensors:
            p.grad = None

    def gradient(self) -> Gradient:
        """What lies in `.grad`; zeros where nothing does."""
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self._tensors
        }


def known(what: str, name: str, names: Any) -> None:
    """Raises unless a name is known.

    Raises:
        ValueError: It is not; the message lists those that are.
    """
    if name not in names:
        raise ValueError(f"{what}: expected one of {', '.join(names)}, got {name!r}")


def _seeded(make: Callable[[int], nn.Module], width: int) -> nn.Module:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (learn2learn's initialiser of linear layers draws from it)
    return make(width)


def _moved(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module
