"""The parity gate: whose meta-gradient is learn2learn's, in float64. No one else gets a ratio."""

from __future__ import annotations

from typing import Any, NamedTuple

from bench.problem import Gradient

LIMIT = 1e-9
# In float32 a ReLU that rounding switches moves a gradient by 1e-3, in any implementation: what is
# timed has to be as near to the float64 oracle as learn2learn is in float32, or nearly.
ROUNDED_LIMIT = 1e-2
TIMES_ORACLE = 10


class Difference(NamedTuple):
    """How far a gradient is from the oracle's, relative and normwise.

    Attributes:
        whole: of all parameters together.
        worst: of the parameter where it is largest.
        parameter: that parameter's name.
    """

    whole: float
    worst: float
    parameter: str

    @property
    def passes(self) -> bool:
        return self.worst < LIMIT  # not so for NaN

    def text(self) -> str:
        return f"wrong by {self.whole:.0e}, {self.parameter} by {self.worst:.0e}"

    def record(self) -> dict[str, Any]:
        return {"limit": LIMIT, **self._asdict()}


def difference(gradient: Gradient, oracle: Gradient) -> Difference:
    """Compare parameter by parameter, so that a small one's error cannot hide in the whole.

    A bias before a batch norm has a gradient of zero, up to rounding: so a parameter's norm counts
    as at least a thousandth of the largest.

    Raises:
        ValueError: The two are not of the same parameters.
    """
    if gradient.keys() != oracle.keys():
        raise ValueError(f"gradients of different parameters: {gradient.keys() ^ oracle.keys()}")
    norms = {name: float(g.double().norm()) for name, g in oracle.items()}
    errors = {name: float((gradient[name].double() - g).norm()) for name, g in oracle.items()}
    least = 1e-3 * max(norms.values())
    relative = {name: errors[name] / max(norms[name], least) for name in norms}
    # max() would pass over a NaN.
    parameter = max(relative, key=lambda name: (relative[name] != relative[name], relative[name]))
    return Difference(_norm(errors) / _norm(norms), relative[parameter], parameter)


def _norm(parts: dict[str, float]) -> float:
    return sum(part**2 for part in parts.values()) ** 0.5
