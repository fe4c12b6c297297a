"""Cases for `functional.inner_loop`: models as lists of layers, operands, and tasks."""

import dataclasses

import torch
from torch import nn

from fastkfo.functional import Layer, inner_loop

# A model by its layers; a number is a linear layer of that width.
MODELS = {
    "head": (7, [5]),
    "one number": (1, [1]),
    "two layers": (3, [17, "relu", 4]),
    "sine": (1, [40, "relu", 40, "relu", 1]),
    "no activation": (6, [3, 4]),
    "smooth": (5, ["tanh", 6, "silu", 9, "sigmoid", 3]),
    "gelu": (5, [8, "gelu", 7, "gelu_tanh", 3]),
    "leaky": (4, [64, "leaky_relu", 2]),
    "batch norm": (6, [9, "batch_norm", "relu", 3]),
    "norm first": (6, ["batch_norm", 4, "layer_norm", "gelu", 3]),
    "layer norm": (33, ["layer_norm", 5, "tanh", "layer_norm", 2]),
    "wide": (128, [40, "relu", 5]),
}
TRANSFORMS = ("none", "psd", "factors", "left", "right", "scale", "all")


@dataclasses.dataclass
class Case:
    """Operands of one call, and how it is made."""

    layers: list[Layer]
    theta: list
    groups: dict[str, list]
    data: list
    options: dict

    def leaves(self):
        """Everything that a gradient can reach."""
        own = [x for group in self.groups.values() for x in group if x is not None]
        return [*self.theta, *own, self.data[0], self.data[2]]

    def __call__(self, **options):
        return inner_loop(
            self.layers, self.theta, *self.data, **self.groups, **(self.options | options)
        )


def layers_of(features, model, bias=True):
    """The layers, and the shapes of their parameters."""
    layers, shapes, width = [], [], features
    for entry in model:
        if isinstance(entry, int):
            first = len(shapes)
            shapes += [(entry, width), (entry,)] if bias else [(entry, width)]
            layers.append(Layer("linear", width, entry, first, first + 1 if bias else -1))
            width = entry
        elif entry.endswith("norm"):
            first = len(shapes)
            shapes += [(width,), (width,)]
            layers.append(Layer(entry, width, width, first, first + 1, 1e-3))
        else:
            layers.append(Layer(entry, width, width, constant=0.1))
    return layers, shapes


def case(
    name,
    transform="psd",
    tasks=3,
    samples=6,
    queries=5,
    steps=2,
    loss="cross_entropy",
    reduction="mean",
    bias=True,
    own=False,
    dtype=torch.float64,
    device="cpu",
    seed=0,
    **options,
):
    """A case with numbers of moderate size, all of which require a gradient."""
    features, model = MODELS[name]
    layers, shapes = layers_of(features, model, bias)
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def mine(shape):
        return (tasks, *shape) if own else shape

    theta = [normal(*mine(s)) / (s[1] ** 0.5 if len(s) == 2 else 3) for s in shapes]
    theta = [x + (i % 2) for i, x in enumerate(theta)] if "norm" in name else theta
    groups = {key: [None] * len(shapes) for key in ("left", "right", "bias", "scale")}
    for i, s in enumerate(shapes):
        n, m = s if len(s) == 2 else (s[0], 1)
        if transform in ("psd", "factors", "left", "all"):
            groups["left"][i] = torch.eye(n) + 0.2 * normal(*mine((n, n)))
        if transform in ("psd", "factors", "right", "all"):
            groups["right"][i] = torch.eye(m) + 0.2 * normal(*mine((m, m)))
        if transform in ("psd", "all"):
            groups["bias"][i] = 0.05 * normal(*mine(s if len(s) == 2 else (n, 1)))
        if transform in ("scale", "all"):
            groups["scale"][i] = 1 + 0.3 * normal(*mine(s))
    classes = layers[-1].out_features
    x_s, x_q = normal(tasks, samples, features), normal(tasks, queries, features)
    if loss == "cross_entropy":
        y_s, y_q = (torch.randint(classes, (tasks, k), generator=g) for k in (samples, queries))
    else:
        y_s, y_q = normal(tasks, samples, classes), normal(tasks, queries, classes)

    def leaf(x):
        return None if x is None else x.to(device, dtype).requires_grad_()

    def data(x):
        return x.to(device, dtype if x.is_floating_point() else x.dtype)

    rate = 0.1 if reduction == "mean" else 0.1 / samples
    options = {"lr": [rate * (1 + 0.2 * i) for i in range(len(shapes))]} | options
    options |= {"steps": steps, "psd": transform == "psd", "loss": loss, "reduction": reduction}
    return Case(
        layers,
        [leaf(x) for x in theta],
        {key: [leaf(x) for x in group] for key, group in groups.items()},
        [leaf(x_s), data(y_s), leaf(x_q), data(y_q)],
        options,
    )


def module_of(layers, theta):
    """The same model as a `nn.Sequential` that holds these parameters."""
    kinds = {
        "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "silu": nn.SiLU, "gelu": nn.GELU,
    }  # fmt: skip
    modules = []
    for layer in layers:
        if layer.kind == "linear":
            module = nn.Linear(layer.in_features, layer.out_features, layer.bias >= 0)
        elif layer.kind == "batch_norm":
            module = nn.BatchNorm1d(layer.in_features, layer.constant)
        elif layer.kind == "layer_norm":
            module = nn.LayerNorm(layer.in_features, layer.constant)
        elif layer.kind == "leaky_relu":
            module = nn.LeakyReLU(layer.constant)
        elif layer.kind == "gelu_tanh":
            module = nn.GELU("tanh")
        else:
            module = kinds[layer.kind]()
        modules.append(module)
        for key, index in (("weight", layer.weight), ("bias", layer.bias)):
            if index >= 0:
                setattr(module, key, nn.Parameter(theta[index].detach().clone()))
    return nn.Sequential(*modules)
