"""Small learners in float64, their tasks, and the meta-learning loop that tests run on them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

CLASSES, STEPS, TASKS, LR = 3, 3, 2, 0.1


class Recurrent(nn.Module):
    """A recurrent net and a linear head on its last output."""

    def __init__(self, cell):
        super().__init__()
        self.rnn = cell(4, 3, batch_first=True)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Tied(nn.Module):
    """One weight used by two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Unused(nn.Module):
    """A weight that no loss depends on, in the middle."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.unused = nn.Linear(2, 3)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)))


class WithScalar(nn.Module):
    """A parameter without axes."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(x) * self.temperature


class Transformer(nn.Module):
    """Attention, layer norms and a linear head on the mean of its outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


def _mlp():
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, CLASSES))


def _frozen():
    model = nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES)
    )
    model[2].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return model


def _cnn():
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, stride=2, padding=1),
        nn.BatchNorm2d(5),
        nn.Tanh(),
        nn.Conv2d(5, 4, (3, 2), padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 12, CLASSES),
    )


def _conv1d():
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, CLASSES))


def _conv3d():
    return nn.Sequential(nn.Conv3d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(24, CLASSES))


# name -> how to build it, the shape of one input
MODELS = {
    "mlp": (_mlp, (4,)),
    "cnn": (_cnn, (2, 6, 6)),
    "lstm": (lambda: Recurrent(nn.LSTM), (5, 4)),
    "gru": (lambda: Recurrent(nn.GRU), (5, 4)),
    "tied": (Tied, (4,)),
    "unused": (Unused, (4,)),
    "frozen": (_frozen, (4,)),
    "conv1d": (_conv1d, (2, 6)),
    "conv3d": (_conv3d, (2, 3, 3, 3)),
    "scalar": (WithScalar, (4,)),
    "transformer": (Transformer, (3, 4)),
}


def build(name):
    """The model of that name, always with the same weights."""
    torch.manual_seed(0)
    return MODELS[name][0]().double()


def task(name, seed=0):
    """x_s, y_s, x_q, y_q of one task for the model of that name."""
    generator = torch.Generator().manual_seed(100 + seed)
    shape = MODELS[name][1]
    x = torch.randn(11, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (11,), generator=generator)
    return x[:6], y[:6], x[6:], y[6:]


def support_loss(learner, name, seed=0):
    x, y, _, _ = task(name, seed)
    return F.cross_entropy(learner(x), y)


def query_loss(learner, name, seed=0):
    _, _, x, y = task(name, seed)
    return F.cross_entropy(learner(x), y)


def perturb(module, size=0.1):
    """Move every parameter away from where it was initialised, always by the same amounts."""
    generator = torch.Generator().manual_seed(7)
    for param in module.parameters():
        noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.data.add_(size * noise.to(param))
    return module


class PlainKron(nn.Module):
    """The Kronecker transform as its formula, for parameters of any rank."""

    def __init__(self, param, bias=False, psd=True):
        super().__init__()
        shape = param.shape
        if len(shape) < 2:
            n, m = max(1, param.numel()), 1
        elif len(shape) == 2:
            n, m = shape
        else:
            n, m = shape[1], param[0, 0].numel()
        self.left = nn.Parameter(torch.eye(n, dtype=torch.float64))
        self.right = nn.Parameter(torch.eye(m, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(n, m, dtype=torch.float64)) if bias else None
        self.psd = psd

    def forward(self, grad):
        left, right = self.left, self.right
        if self.psd:
            left, right = left.T @ left, right.T @ right
        blocks = grad.reshape(-1, len(left), len(right))
        update = torch.einsum("ab,ibc,cd->iad", left, blocks, right)
        if self.bias is not None:
            update = update + self.bias
        return update.reshape(grad.shape)


class Squash(nn.Module):
    """A non-linear transform of a user's own."""

    def __init__(self, param):
        super().__init__()
        self.a = nn.Parameter(torch.ones_like(param))
        self.b = nn.Parameter(torch.tensor(0.5, dtype=param.dtype))

    def forward(self, grad):
        return self.a * torch.tanh(grad) + self.b * grad


def kronecker(psd, bias):
    return lambda lib, model: lib.optim.KroneckerTransform(
        lib.nn.KroneckerLinear, bias=bias, psd=psd
    )


def dictionary(lib, model):
    """A module's and a parameter's transforms; the others are updated by plain SGD."""
    params = list(model.parameters())
    first = next(m for m in model.modules() if m._parameters)
    kron = lib.optim.KroneckerTransform(lib.nn.KroneckerLinear)
    return lib.optim.transforms.TransformDictionary(
        {first: kron, params[-2]: lib.optim.MetaCurvatureTransform}
    )


def mixture(lib, model):
    """Every kind of transform in one learner."""
    makers = [TRANSFORMS[k] for k in ("kron-psd", "curvature", "scale", "user", "kron-bias")]
    made = [make(lib, model) for make in makers]
    chosen = {id(p): made[i % len(made)] for i, p in enumerate(model.parameters())}
    return lambda p: chosen[id(p)](p)


TRANSFORMS = {
    "kron": kronecker(False, False),
    "kron-bias": kronecker(False, True),
    "kron-psd": kronecker(True, False),
    "kron-psd-bias": kronecker(True, True),
    "curvature": lambda lib, model: lib.optim.MetaCurvatureTransform,
    "curvature-lr": lambda lib, model: lambda p: lib.optim.MetaCurvatureTransform(p, lr=0.7),
    "module": lambda lib, model: lib.optim.ModuleTransform(nn.Linear),
    "dictionary": dictionary,
    "scale": lambda lib, model: lambda p: lib.nn.Scale(p.shape),
    "user": lambda lib, model: Squash,
    "none": lambda lib, model: lambda p: None,
    "mixture": mixture,
}


def learner_of(lib, name, transform, olib=None, **options):
    """A perturbed GBML of one library with the transforms of another."""
    model = build(name)
    made = TRANSFORMS[transform](olib or lib, model)
    return perturb(lib.algorithms.GBML(model, made, lr=LR, **options).double())


class Outcome(NamedTuple):
    """What one meta-iteration gives."""

    losses: list  # each task's query loss
    adapted: list  # each task's adapted tensors
    grads: dict  # meta-gradients by name


def collect(learner, run_task, tasks=TASKS):
    """Run and differentiate `run_task(t) -> (query loss, adapted tensors)` for every task."""
    losses, adapted = [], []
    for t in range(tasks):
        loss, tensors = run_task(t)
        loss.backward()
        losses.append(loss.detach())
        adapted += [p.detach().clone() for p in tensors]
    return Outcome(losses, adapted, {name: p.grad for name, p in learner.named_parameters()})


def meta_iteration(learner, name, steps=STEPS, clone=None, adapt=None, tasks=TASKS):
    """learn2learn's loop over all tasks; `clone` and `adapt` are the options of these calls."""

    def run_task(t):
        copy = learner.clone(**(clone or {}))
        for _ in range(steps):
            copy.adapt(support_loss(copy, name, t), **(adapt or {}))
        return query_loss(copy, name, t), list(copy.parameters())

    return collect(learner, run_task, tasks)


def assert_close(got, want, floor=0.0, tol=1e-10, what=""):
    """Equal in norm; `floor` is the size below which a tensor is nothing but rounding."""
    assert (got is None) == (want is None), f"{what}: got {got}, expected {want}"
    if want is None:
        return
    assert got.shape == want.shape, what
    error, size = (got - want).norm().item(), max(want.norm().item(), floor)
    assert error <= tol * size, f"{what}: relative error {error / size:.1e}"


def assert_same(got, want, tol=1e-10):
    """Two outcomes are equal. A bias before a batch norm has a gradient of rounding alone."""
    for i, (a, b) in enumerate(zip(got.losses, want.losses, strict=True)):
        assert_close(a, b, tol=tol, what=f"loss {i}")
    for i, (a, b) in enumerate(zip(got.adapted, want.adapted, strict=True)):
        assert_close(a, b, floor=1e-3, tol=tol, what=f"adapted tensor {i}")
    total = sum(g.square().sum() for g in want.grads.values() if g is not None).sqrt().item()
    assert total > 0
    pairs = zip(got.grads.items(), want.grads.values(), strict=True)
    for (name, a), b in pairs:
        assert_close(a, b, floor=1e-4 * total, tol=tol, what=f"gradient of {name}")


def snapshot(learner):
    """What a failed call must leave alone: parameters and buffers by identity, and options."""
    options = {k: v for k, v in vars(learner).items() if isinstance(v, (bool, int, float))}
    tensors = [*learner.named_parameters(), *learner.named_buffers()]
    return [(n, id(t), t._version) for n, t in tensors], options, [t for _, t in tensors]
