"""`functional.inner_loop`: what it refuses, and with which words."""

import pytest
import torch

from fastkfo.functional import inner_loop
from fastkfo.kernels import selector
from tests.cases import needs_native
from tests.inner_loop_cases import case

pytestmark = needs_native


BAD = {
    "steps: expected at least 0": {"steps": -1},
    "steps: expected an int": {"steps": 1.5},
    "loss: expected one of": {"loss": "hinge"},
    "reduction: expected one of": {"reduction": "none"},
    "left: expected 4 entries": {"left": [None]},
    "lr: expected one rate per parameter": {"lr": [0.1]},
    "lr of parameter 0: expected a scalar": {"lr": [torch.ones(3)] * 4},
    "implementation: expected one of": {"implementation": "fast"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options(message):
    c = case("two layers", "none")
    wrong = BAD[message]
    groups = {k: v for k, v in c.groups.items() if k not in wrong}
    with pytest.raises((TypeError, ValueError), match=message):
        inner_loop(c.layers, c.theta, *c.data, **groups, **(c.options | wrong))


def test_bad_inputs():
    c = case("two layers", "psd")
    x_s, y_s, x_q, y_q = c.data

    def call(*data, layers=c.layers, theta=c.theta, **groups):
        return inner_loop(layers, theta, *data, **(c.groups | groups), **c.options)

    wrong = y_q.clone()
    wrong[0, 0] = 4
    cases = {
        "y_q: expected labels from 0 to 3, got 4": (x_s, y_s, x_q, wrong),
        "y_s: expected shape": (x_s, y_s[:, :2], x_q, y_q),
        "y_s: expected labels of int64": (x_s, y_s.float(), x_q, y_q),
        "x_q: expected 3 features": (x_s, y_s, x_q[..., :2], y_q),
        "x_q: expected .* with 3 tasks": (x_s, y_s, x_q[:2], y_q),
        "x_q: expected torch.float64": (x_s, y_s, x_q.float(), y_q),
        "y_q: expected None without x_q": (x_s, y_s, None, y_q),
    }
    for message, data in cases.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call(*data)
    with pytest.raises(ValueError, match="left of parameter 0: expected shape"):
        call(*c.data, left=[torch.eye(3).double(), *c.groups["left"][1:]])
    with pytest.raises(TypeError, match="theta of parameter 1: expected a tensor"):
        call(*c.data, theta=[c.theta[0], 1.0, *c.theta[2:]])
    layers = [c.layers[0], c.layers[1]._replace(kind="maxout"), c.layers[2]]
    with pytest.raises(ValueError, match=r"layers: expected one of .* at position 1, got 'maxout'"):
        call(*c.data, layers=layers)
    layers = [c.layers[0], c.layers[2]._replace(in_features=5)]
    with pytest.raises(ValueError, match="layers: expected 17 features to come into position 1"):
        call(*c.data, layers=layers)
    with pytest.raises(ValueError, match="layers: expected each of 4 parameters"):
        call(*c.data, layers=c.layers[:1])


def test_an_implementation_by_name_does_not_degrade():
    if selector.unavailable("triton", "cpu") is None:
        pytest.skip("triton runs here")
    with pytest.raises(selector.ImplementationUnavailable):
        case("head")(implementation="triton")
