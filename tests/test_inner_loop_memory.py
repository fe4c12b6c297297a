"""Memory modes and chunks: the same meta-gradient, with random modules too, from less memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.inner_loop import memory, pieces
from tests.batches import batch, learner
from tests.models import CLASSES, LR, assert_close, perturb

MODES = {
    "checkpoint": {"memory": "checkpoint"},
    "adjoint": {"memory": "adjoint"},
    "loop-adjoint": {"backend": "loop", "memory": "adjoint"},
}
CHUNKS = {
    "chunks": {"chunk_size": 2},
    "chunks-checkpoint": {"chunk_size": 2, "memory": "checkpoint"},
    "chunks-adjoint": {"chunk_size": 3, "memory": "adjoint"},
    "loop-chunks": {"backend": "loop", "chunk_size": 1},
}


class Noisy(nn.Module):
    """Draws in every way: dropout, noise on weights and on activations."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, CLASSES)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        weight = self.first.weight + 0.1 * torch.randn_like(self.first.weight)
        h = torch.tanh(F.linear(x, weight, self.first.bias))
        h = F.dropout(self.norm(h), 0.3, self.training)
        return self.second(h + 0.1 * torch.rand(h.shape, dtype=h.dtype))


def noisy(**options):
    torch.manual_seed(0)
    kron = fastkfo.optim.KroneckerTransform(fastkfo.nn.KroneckerLinear)
    own = fastkfo.algorithms.GBML(Noisy().double(), kron, lr=LR, **options)
    return perturb(own.double())


def features():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.2)).double()


def gradients(loop, seed=5):
    """Outcome and meta-gradients of one call from one random state."""
    torch.manual_seed(seed)
    out = loop(*batch("mlp", 5), step_weights=[0.5] * loop.steps)
    after = torch.get_rng_state()
    out.loss.sum().backward()
    assert torch.equal(torch.get_rng_state(), after), "the backward pass draws anew"
    return out, [p.grad for p in loop.parameters()]


@pytest.mark.parametrize("path", (MODES | CHUNKS).values(), ids=MODES | CHUNKS)
@pytest.mark.parametrize(
    "options",
    [{}, {"adapt_transform": True}, {"first_order": True}],
    ids=["second", "adapt", "first"],
)
def test_the_same_draws(options, path):
    chunk = path.get("chunk_size")
    plain = {"backend": path.get("backend", "batched")}
    if chunk:  # draws go chunk by chunk: the graph of every chunk, kept
        plain["chunk_size"] = chunk
    want = fastkfo.InnerLoop(noisy(**options), F.cross_entropy, 3, features=features(), **plain)
    found = fastkfo.InnerLoop(noisy(**options), F.cross_entropy, 3, features=features(), **path)
    for loop in (want, found):
        loop.train()
    kept = _with_graphs(want) if chunk else gradients(want)
    out, grads = gradients(found)
    assert_close(out.loss.detach(), kept[0].loss.detach())
    assert_close(out.support_loss, kept[0].support_loss)
    total = sum(g.square().sum() for g in kept[1]).sqrt().item()
    for a, b in zip(grads, kept[1], strict=True):
        assert_close(a, b, floor=1e-4 * total)
    buffers = zip(found.named_buffers(), want.buffers(), strict=True)
    for (name, a), b in buffers:
        assert_close(a.double(), b.double(), tol=1e-12, what=name)


def _with_graphs(loop):
    """Chunk by chunk with `memory="full"` and no second run."""
    with pytest.MonkeyPatch.context() as patch:
        run = pieces.run_pieces
        patch.setattr(
            "fastkfo.inner_loop.inner_loop.run_pieces", lambda *args: run(*args[:-1], False)
        )
        return gradients(loop)


def test_dropout_is_really_on():
    loop = fastkfo.InnerLoop(noisy(), F.cross_entropy, 2).train()
    assert not torch.equal(gradients(loop, 1)[0].predictions, gradients(loop, 2)[0].predictions)


@pytest.mark.parametrize("path", [*MODES.values()], ids=MODES)
def test_no_graph_is_kept(path):
    """Of K steps one is in memory at a time: what autograd saves does not grow with K."""

    def saved(steps, **options):
        count = 0

        def pack(x):
            nonlocal count
            count += x.numel()
            return x

        loop = fastkfo.InnerLoop(learner("cnn", "kron-psd"), F.cross_entropy, steps, **options)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = loop(*batch("cnn", 3))
        alive = _graph_size(out.loss.grad_fn)
        return count, alive

    full = [saved(k)[1] for k in (2, 6)]
    least = [saved(k, **path)[1] for k in (2, 6)]
    assert full[1] > 2 * full[0]
    assert least[0] == least[1]


def _graph_size(node):
    seen, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [n for n, _ in node.next_functions]
    return len(seen)


def test_the_adjoint_keeps_theta_alone():
    ours = learner("mlp", "kron-psd", adapt_transform=True)
    loop = fastkfo.InnerLoop(ours, F.cross_entropy, 4, memory="adjoint")
    kept = []
    forward = memory.Walk

    class Watched(forward):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "Walk", Watched)
        loop(*batch("mlp", 3))
    (walk,) = kept
    assert len(walk.states) == 5
    assert all(state.last is None for state in walk.states[:-1])
    assert not any(p.requires_grad for state in walk.states[1:] for p in state.theta)


@pytest.mark.parametrize("path", (MODES | CHUNKS).values(), ids=MODES | CHUNKS)
def test_a_second_backward_pass_over_the_same_graph(path):
    loop = fastkfo.InnerLoop(learner("mlp", "kron-psd"), F.cross_entropy, 2, **path)
    out = loop(*batch("mlp", 4))
    out.loss.sum().backward(retain_graph=True)
    once = [p.grad.clone() for p in loop.parameters()]
    out.loss.sum().backward()
    for p, g in zip(loop.parameters(), once, strict=True):
        assert_close(p.grad, 2 * g)


@pytest.mark.parametrize("path", (MODES | CHUNKS).values(), ids=MODES | CHUNKS)
def test_part_of_what_is_learned(path):
    """Gradients only where they are wanted; a task of weight zero counts for nothing."""
    loop = fastkfo.InnerLoop(learner("mlp", "kron-psd"), F.cross_entropy, 2, **path)
    out = loop(*batch("mlp", 4))
    wanted = [p for n, p in loop.named_parameters() if "left" in n]
    found = torch.autograd.grad(out.loss[1:3].sum(), wanted)
    full = fastkfo.InnerLoop(learner("mlp", "kron-psd"), F.cross_entropy, 2)
    x = [t[1:3] for t in batch("mlp", 4)]
    want = torch.autograd.grad(
        full(*x).loss.sum(), [p for n, p in full.named_parameters() if "left" in n]
    )
    for a, b in zip(found, want, strict=True):
        assert_close(a, b)


def test_peak_memory_is_that_of_a_chunk():
    """Counted in numbers held by autograd's graphs, which do not depend on the machine."""

    def most(chunk_size, tasks):
        held, highest = 0, 0

        class Held:
            def __init__(self, x):
                nonlocal held, highest
                self.x = x
                held += x.numel()
                highest = max(highest, held)

            def __del__(self):
                nonlocal held
                held -= self.x.numel()

        loop = fastkfo.InnerLoop(
            learner("cnn", "kron-psd"), F.cross_entropy, 2, chunk_size=chunk_size
        )
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.x):
            loop(*batch("cnn", tasks)).loss.sum().backward()
        return highest

    few, many, whole = most(2, 4), most(2, 16), most(None, 16)
    inputs = sum(x.numel() for x in batch("cnn", 16))
    assert many <= few + 2 * inputs
    assert whole > 2 * many
