"""Whole meta-gradients of convolutional learners against learn2learn, in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.inner_loop.explain import lines as explained
from fastkfo.inner_loop.inputs import Batch
from fastkfo.nn import Flatten, Lambda
from fastkfo.vision import models
from fastkfo.vision.models.resnet12 import BasicBlock
from fastkfo.vision.models.wrn28 import wide_basic
from tests import oracle
from tests.cases import HAS_NATIVE, needs_native

WAYS, TASKS, STEPS, LR = 3, 2, 2, 0.1


def kfo_script(blocks, **options):
    """The convolutions of the KFO scripts; then a mean, without which a factor is too large."""
    base = models.ConvBase(hidden=6, channels=3, layers=blocks, **options)
    mean = Lambda(lambda x: x.mean(dim=[2, 3]))
    return nn.Sequential(base, mean, Flatten(), nn.Linear(6, WAYS))


def shortcut(channels, planes):
    return nn.Sequential(nn.Conv2d(channels, planes, 1, bias=False), nn.BatchNorm2d(planes))


def resnet12():
    """Residual blocks as ResNet-12's, in few channels."""
    return nn.Sequential(
        BasicBlock(3, 5, 2, shortcut(3, 5)),
        BasicBlock(5, 6, 2, shortcut(5, 6)),
        nn.AvgPool2d(2, stride=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, WAYS),
    )


class WideResNet(nn.Module):
    """Blocks of WRN-28-10, few and narrow: norms come before convolutions, results are added."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(wide_basic(4, 5, 0.0, 1), wide_basic(5, 6, 0.0, 2))
        self.norm, self.head = nn.BatchNorm2d(6, momentum=0.9), nn.Linear(6 * 4, WAYS)

    def forward(self, x):
        x = F.relu(self.norm(self.blocks(self.first(x))))
        x = F.avg_pool2d(x, 2)
        return self.head(x.view(x.size(0), -1))


MODELS = {
    "cnn4": (lambda: kfo_script(4, max_pool=True), (3, 16, 16)),
    "kfo_2": (lambda: kfo_script(2, max_pool=False, max_pool_factor=0.5), (3, 9, 8)),
    "kfo_4": (lambda: kfo_script(4, max_pool=False, max_pool_factor=0.5), (3, 8, 8)),
    "omniglot": (
        lambda: nn.Sequential(*list(models.OmniglotCNN(WAYS, hidden_size=7).children())[-2:]),
        (1, 28, 28),
    ),
    "resnet12": (resnet12, (3, 12, 12)),
    "wide_resnet": (WideResNet, (3, 8, 8)),
}


class Inplace(nn.Module):
    """ReLU in place, a norm's result that is used twice, a shortcut written to, a viewed map."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding="same")
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(4) for _ in range(3))
        self.second = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.third = nn.Conv2d(4, 4, 2, padding="valid", groups=2)
        self.group = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4 * 9, WAYS)

    def forward(self, x):
        x = F.relu(self.norm1(self.first(x)), inplace=True)
        y = self.norm2(self.second(x))
        x = torch.relu(y) + y
        y = self.norm3(self.third(x))
        y += 0.5
        x = self.group(F.max_pool2d(F.relu(y), 2, 2, 1))
        return self.head(x.view(len(x), -1))


class Unusual(nn.Module):
    """What a forward may do and layers that lie otherwise must not change."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = (
            nn.Conv2d(3, 4, 3, np.int64(1), padding=1),
            nn.BatchNorm2d(4, affine=False),
        )
        self.second, self.other = nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, WAYS)

    def forward(self, x):
        h = self.conv(x)
        h = h - h.mean(axis=1, keepdim=True) + torch.mean(h, dim=(2, 3), keepdim=True)
        with torch.no_grad():
            constant = self.norm(h)
        h = F.relu(constant) + 0.1 * h
        h = F.max_pool2d(F.elu(self.other(self.second(h))), np.int64(2), 1)
        return self.head(F.adaptive_avg_pool2d(h, 1).squeeze(-1).squeeze(-1))


class Writes(nn.Module):
    """Writes through a view, which a copy would lose."""

    def __init__(self, name):
        super().__init__()
        self.name, self.conv = name, nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, WAYS)

    def forward(self, x):
        h = self.conv(x)
        flat = h.view(h.size(0), -1) if self.name == "view" else h.flatten(1)
        flat.mul_(0.5) if self.name == "view" else F.leaky_relu(flat, 0.1, True)
        return self.head(h.mean([2, 3]))


MODELS["inplace"] = (Inplace, (3, 5, 5))
MODELS["unusual"] = (Unusual, (3, 5, 5))

LEARNERS = {
    "kfo": lambda lib, m: lib.algorithms.GBML(
        m, transform=lib.optim.KroneckerTransform(lib.nn.KroneckerLinear), lr=LR
    ),
    "maml": lambda lib, m: lib.algorithms.MAML(m, lr=LR),
    "first_order": lambda lib, m: lib.algorithms.MAML(m, lr=LR, first_order=True),
}


def learner(lib, name, kind):
    torch.manual_seed(0)
    made = LEARNERS[kind](lib, MODELS[name][0]().double())
    made = made.double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


def tasks(shape, count=TASKS, dtype=torch.float64):
    x = torch.randn(2, count, 2 * WAYS, *shape).to(dtype)
    y = torch.arange(WAYS).repeat_interleave(2).expand(count, -1).contiguous()
    return x[0], y, x[1], y


def by_learn2learn(theirs, x_s, y_s, x_q, y_q):
    losses = []
    for t in range(len(x_s)):
        clone = theirs.clone()
        for _ in range(STEPS):
            clone.adapt(F.cross_entropy(clone(x_s[t]), y_s[t]))
        losses.append(F.cross_entropy(clone(x_q[t]), y_q[t]))
    return torch.stack(losses)


def compare(ours, theirs):
    pairs = [(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)]
    largest = max(g.norm().item() for _, g in pairs)
    for mine, g in pairs:  # a convolution's bias in front of a batch norm has a gradient of zero
        assert (mine - g).norm() <= 1e-9 * (g.norm() + 1e-3 * largest)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["batched", "loop"])
def test_equals_learn2learn(name, kind, backend):
    data = tasks(MODELS[name][1])
    theirs, ours = learner(oracle.load(), name, kind), learner(fastkfo, name, kind)
    want = by_learn2learn(theirs, *data)
    want.sum().backward()
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, STEPS, backend=backend)
    found = loop(*data).loss
    found.sum().backward()
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
    compare(ours, theirs)


@pytest.mark.filterwarnings("ignore:fastkfo. tasks run one after the other")
@pytest.mark.parametrize("name", ["view", "flatten"])
def test_writes_through_views_are_not_lost(name):
    data = tasks((3, 4, 4))
    theirs, ours = oracle.load().algorithms, fastkfo.algorithms
    theirs, ours = (lib.MAML(Writes(name).double(), lr=LR) for lib in (theirs, ours))
    ours.load_state_dict(theirs.state_dict())
    by_learn2learn(theirs, *data).sum().backward()
    fastkfo.InnerLoop(ours, F.cross_entropy, STEPS)(*data).loss.sum().backward()
    compare(ours, theirs)


def test_a_loss_that_views_images():
    """Results lie as PyTorch's own layers leave them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
    x = torch.randn(TASKS, 4, 3, 5, 5)

    def loss(prediction, target):
        return F.mse_loss(prediction.view(len(prediction), -1), target.view(len(target), -1))

    loop = fastkfo.InnerLoop(fastkfo.algorithms.MAML(model, lr=LR), loss, STEPS)
    out = loop(x, x, x, x)
    assert out.predictions.view(TASKS, -1).shape == (TASKS, 4 * 3 * 25)
    assert loop.why_one_by_one() is None


@pytest.mark.parametrize("name", ["kfo_2", "resnet12"])
def test_features(name):
    """Shared weights: one convolution over all samples of all tasks."""
    torch.manual_seed(0)
    base, head = MODELS[name][0]().double()[:-1], nn.Linear(6, WAYS).double()
    data = tasks(MODELS[name][1])
    found = []
    for backend in ("batched", "loop"):
        for p in (*base.parameters(), *head.parameters()):
            p.grad = None
        ours = fastkfo.algorithms.MAML(head, lr=LR)
        loop = fastkfo.InnerLoop(ours, F.cross_entropy, STEPS, features=base, backend=backend)
        loop(*data).loss.sum().backward()
        found.append([p.grad for p in (*base.parameters(), *head.parameters())])
    total = max(g.norm() for g in found[1])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-9 * (b.norm() + 1e-3 * total)


@needs_native
def test_what_runs_on_kernels():
    data = tasks(MODELS["inplace"][1])
    loop = fastkfo.InnerLoop(learner(fastkfo, "inplace", "maml"), F.cross_entropy, 1)
    lines = "\n".join(explained(loop, Batch(*data[:2])))
    assert "model, F.conv2d: one native call for all tasks" in lines
    assert "model, F.relu: differentiated together with the batch norm before it" in lines
    assert "model, F.max_pool2d: one native call" in lines
    assert "model, F.linear: " in lines


def test_bfloat16_autocast_is_near_float32():
    """Parameters, factors and their gradients stay float32."""
    data = tasks((3, 9, 8), dtype=torch.float32)
    found = []
    for enabled in (False, True):
        ours = learner(fastkfo, "kfo_2", "kfo").float()
        loop = fastkfo.InnerLoop(ours, F.cross_entropy, STEPS, backend="batched")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = loop(*data)
        out.loss.sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
        found.append(torch.cat([p.grad.flatten() for p in ours.parameters()]))
    assert 1e-6 < (found[1] - found[0]).norm() / found[0].norm() < 0.2


@pytest.mark.skipif(not HAS_NATIVE, reason="needs the native library")
def test_no_layer_of_one_task_reads_another():
    """A NaN in one task's images leaves the other's gradient as it is without it."""
    data = tasks(MODELS["cnn4"][1], dtype=torch.float32)
    grads = []
    for rows in (slice(0, 2), slice(1, 2)):
        ours = learner(fastkfo, "cnn4", "kfo").float()
        x_s, y_s, x_q, y_q = (x[rows].clone() for x in data)
        if len(x_s) == 2:
            x_s[0, 0, 0, 0, 0] = torch.nan
        out = fastkfo.InnerLoop(ours, F.cross_entropy, STEPS)(x_s, y_s, x_q, y_q)
        assert out.finite.tolist() == [False, True][-len(x_s) :]
        out.loss[-1].backward()
        grads.append([p.grad for p in ours.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5)
