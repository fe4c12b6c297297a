"""The modules that the tests of fastkfo.utils clone and update."""

import torch
from torch import nn

from tests.oracle import learn2learn

l2l = learn2learn()


class Tied(nn.Module):
    """A weight used twice, and a submodule used twice."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.c = nn.Linear(4, 4)
        self.again = self.c

    def forward(self, x):
        return self.again(torch.tanh(self.c(self.b(torch.tanh(self.a(x))))))


class GradBuffer(nn.Module):
    """One buffer in the graph, one outside."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4, requires_grad=True))
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x):
        return self.lin(x) * self.scale + self.count


class Recurrent(nn.Module):
    """An LSTM and a head."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 3, num_layers=2)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.rnn(x.unsqueeze(0))[0][0])


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False))


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


MODELS = {"mlp": mlp, "cnn": cnn, "tied": Tied, "grad-buffer": GradBuffer, "lstm": Recurrent}
DTYPES = [torch.float32, torch.float64]


def two_models(name, dtype=torch.float64):
    """Return twice the same model, with the same weights."""
    torch.manual_seed(0)
    first = MODELS[name]().to(dtype)
    torch.manual_seed(0)
    second = MODELS[name]().to(dtype)
    if name == "grad-buffer":  # .to() made it a non-leaf where it changed the dtype
        for m in (first, second):
            m.scale = m.scale.detach().requires_grad_()
    return first, second


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, generator=generator, dtype=dtype)


def assert_all_equal(got, expected):
    got, expected = list(got), list(expected)
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=0)
