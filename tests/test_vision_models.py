"""Vision models equal learn2learn's: weights from the same seed, outputs, gradients, statistics."""

import copy
import inspect
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkfo
from fastkfo.vision import models
from tests.oracle import learn2learn, vision_models

l2l, oracle = learn2learn(), vision_models()


def case(path, shape, **options):
    """Where the class is, its options, the shape of an input (None: too large to run here)."""
    return path, options, shape


CASES = {
    "linear-block": case("cnn4.LinearBlock", (4, 6), input_size=6, output_size=5),
    "conv-block": case("ConvBlock", (2, 2, 8, 8), in_channels=2, out_channels=3, kernel_size=3),
    "conv-block-strided": case(
        "ConvBlock", (2, 2, 9, 8), in_channels=2, out_channels=3, kernel_size=(5, 3),
        max_pool=False, max_pool_factor=1.7),
    "conv-base": case("ConvBase", (3, 1, 9, 9), hidden=4, layers=2),
    "conv-base-1": case("ConvBase", (2, 2, 6, 6), layers=1, max_pool=True, channels=2),
    "conv-base-pool": case(
        "ConvBase", (2, 2, 5, 6), hidden=5, channels=2, max_pool=True, layers=2,
        max_pool_factor=0.5),
    "omniglot-fc": case("OmniglotFC", (4, 1, 28, 28), input_size=784, output_size=5),
    "omniglot-fc-sizes": case("OmniglotFC", (4, 2, 4), input_size=8, output_size=3, sizes=(7, 6)),
    "omniglot-cnn": case("OmniglotCNN", (3, 1, 28, 28)),
    "omniglot-cnn-small": case("OmniglotCNN", (3, 784), output_size=3, hidden_size=8, layers=2),
    "cnn4": case("CNN4", (2, 3, 84, 84), output_size=5, hidden_size=8),
    "cnn4-strided": case(
        "MiniImagenetCNN", (3, 1, 28, 28), output_size=2, hidden_size=4, channels=1,
        max_pool=False, embedding_size=16),
    "cnn4-2": case("CNN4", (2, 3, 84, 84), output_size=2, hidden_size=4, layers=2),
    "cnn4-3": case(
        "CNN4", (2, 3, 25, 24), output_size=2, hidden_size=4, layers=3, embedding_size=36),
    "backbone4": case("CNN4Backbone", (2, 3, 32, 32)),
    "backbone4-6": case("CNN4Backbone", (2, 3, 4, 4), hidden_size=4, layers=6, max_pool_factor=0.5),
    "basic-block": case(
        "resnet12.BasicBlock", (2, 3, 12, 11), inplanes=3, planes=3, drop_rate=0.3,
        drop_block=True, block_size=4),
    "resnet12": case("ResNet12", (1, 3, 84, 84), output_size=5, dropblock_dropout=0.2),
    "resnet12-narrow": case(
        "ResNet12", (2, 1, 32, 32), output_size=2, hidden_size=2048, avg_pool=False, wider=False,
        embedding_dropout=0.5, dropblock_size=2, channels=1),
    "backbone12": case(
        "ResNet12Backbone", (2, 3, 18, 17), avg_pool=False, dropblock_dropout=0.0),
    "wide-block": case(
        "wrn28.wide_basic", (2, 4, 6, 6), in_planes=4, planes=4, dropout_rate=0.5),
    "wide-resnet": case(
        "wrn28.WideResNet", (1, 3, 81, 84), depth=16, widen_factor=1, dropout_rate=0.3),
    "wrn28": case("WRN28", None, output_size=5, dropout=0.1),
}  # fmt: skip
RUN = {name: case for name, case in CASES.items() if case[2] is not None}
SMALL = [name for name in RUN if not name.startswith(("resnet12", "backbone12", "wrn"))]


def seed(value):
    torch.manual_seed(value)
    np.random.seed(value)  # noqa: NPY002 (learn2learn's code draws from the global state)


def random_state():
    _, keys, position, *_ = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state(), torch.tensor([*keys.tolist(), position])


def find(root, path):
    for part in path.split("."):
        root = getattr(root, part)
    return root


def make(root, name, dtype=torch.float64):
    path, options, _ = CASES[name]
    seed(7)
    model = find(root, path)(**options).to(dtype)
    for module in model.modules():
        if isinstance(module, root.resnet12.BasicBlock):
            module.num_batches_tracked = 20000  # half of the way to DropBlock's full rate
    return model


def images(name, device="cpu"):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*CASES[name][2], generator=generator, dtype=torch.float64)
    return x.to(device)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_same_weights_from_the_same_seed(name):
    ours = make(models, name, torch.float32)
    state = random_state()
    theirs = make(oracle, name, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(state, random_state(), strict=True))
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for key in a:  # of normals truncated by numpy's draws, an ulp may differ
        torch.testing.assert_close(a[key], b[key], rtol=2e-7, atol=0)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert {k for k in vars(theirs) if k[0] != "_"} <= set(vars(ours))
    with torch.no_grad():
        next(theirs.parameters()).add_(1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert all(torch.equal(v, b[k]) for k, v in ours.state_dict().items())


def test_signatures():
    for path in sorted({path for path, *_ in CASES.values()} | {"WRN28Backbone"}):
        ours, theirs = (inspect.signature(find(r, path)).parameters for r in (models, oracle))
        ours = {k: v.default for k, v in ours.items() if (path, k) != ("ConvBase", "output_size")}
        assert list(ours.items()) == [(k, v.default) for k, v in theirs.items()], path
    assert set(oracle.__all__) - set(models.__all__) == {"get_pretrained_backbone"}
    assert fastkfo.vision.models is models
    assert models.CNN4 is models.MiniImagenetCNN


def passes(model, x):
    """Two training passes with gradients and one evaluation: everything they leave behind."""
    out = []
    for _ in range(2):
        seed(1)
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        grads = torch.autograd.grad(y.square().sum(), [inputs, *model.parameters()])
        out += [y.detach(), *grads, *[b.clone() for b in model.buffers()], *random_state()]
    with torch.no_grad():
        out.append(model.eval()(x))
    return out


@pytest.mark.parametrize("name", RUN)
def test_equals_learn2learn(name, device):
    x = images(name, device)
    ours = passes(make(models, name).to(device), x)
    close(ours, passes(make(oracle, name).to(device), x))
    assert ours[0].isfinite().all()
    own_statistics = name.startswith(("linear", "omniglot-fc"))
    assert torch.allclose(ours[0], ours[-1]) == own_statistics  # else training is no evaluation


@pytest.mark.parametrize("name", ["basic-block", "wide-block"])
@pytest.mark.parametrize("training", [True, False])
def test_drops_by_the_random_state_and_only_in_training(name, training):
    model, out = make(models, name).train(training), []
    for value in (0, 1):
        seed(value)
        out.append(model(images(name)))
    assert torch.equal(*out) == (not training)


@pytest.mark.parametrize("gamma", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_dropblock(size, gamma):
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    modules = [find(root, "resnet12.DropBlock")(size) for root in (models, oracle)]
    kept = []
    for value in range(20):  # numbers of squares with and without a factor in common with size²
        runs = []
        for module in modules:
            seed(value)
            runs.append(module(x, gamma=gamma))
        close(*runs)
        kept.append((runs[0] != 0).double().mean().item())
    assert min(kept) < 1 if gamma else min(kept) == 1
    assert torch.equal(modules[0].eval()(x, gamma=gamma), x)


def test_dropblock_that_drops_everything_is_zero():
    x = torch.randn(2, 3, 5, 5)
    drop = models.resnet12.DropBlock(5)
    assert torch.equal(drop(x, gamma=1.0), torch.zeros_like(x))
    assert drop(x.bfloat16(), gamma=0.5).dtype is torch.bfloat16
    assert oracle.resnet12.DropBlock(5)(x, gamma=1.0).isnan().all()


def test_passes_are_counted_as_in_learn2learn():
    counts = []
    for root in (models, oracle):
        block = make(root, "basic-block")
        block(images("basic-block"))
        block.eval()(images("basic-block"))
        counts.append(block.num_batches_tracked)
    assert counts == [20002, 20002]


def test_wrn28_is_the_wide_network_of_depth_28_and_width_10():
    backbone = models.WRN28Backbone(dropout=0.25)
    wide = models.wrn28.WideResNet(28, 10, 0.25)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (backbone, wide)]
    assert shapes[0] == shapes[1]
    assert {m.p for m in backbone.modules() if isinstance(m, nn.Dropout)} == {0.25}
    model = models.WRN28(3, hidden_size=64)
    model.features = models.wrn28.WideResNet(10, 1, 0.0)
    x = torch.randn(2, 3, 81, 81)
    assert torch.equal(model.eval()(x), model.classifier(model.features(x)))


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (200, 300)])
def test_truncated_normal(shape, mean):
    out = []
    for root in (models, oracle):
        seed(5)
        x = torch.full(shape, math.nan, dtype=torch.float64)
        if shape == () and root is oracle:  # learn2learn crashes
            x = root.cnn4.truncated_normal_(x.reshape(1), mean, 0.5).reshape(())
        else:
            assert root.cnn4.truncated_normal_(x, mean, 0.5) is x
        out.append(x)
    close(*out)
    assert ((out[0] - mean).abs() <= 1).all()


def test_initialisers_return_their_layer_and_take_one_without_a_bias():
    for init in (models.fc_init_, models.maml_init_):
        layer = nn.Linear(3, 4, bias=False)
        before = layer.weight.detach().clone()
        assert init(layer) is layer
        assert not torch.equal(layer.weight, before)


def meta_gradient(library, model, x, y):
    transform = library.optim.KroneckerTransform(library.nn.KroneckerLinear, psd=True)
    learner = library.algorithms.GBML(model, transform=transform, lr=0.1).double()
    clone = learner.clone()
    for _ in range(2):
        clone.adapt(F.cross_entropy(clone(x), y))
    loss = F.cross_entropy(clone(x.flip(0)), y)
    names, parameters = zip(*learner.named_parameters(), strict=True)
    return loss, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_second_order_meta_gradient_equals_learn2learn():
    x, y = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.arange(4) % 2
    runs = []
    for library, root in ((fastkfo, models), (l2l, oracle)):
        seed(11)
        model = root.CNN4(2, hidden_size=4, embedding_size=4)
        runs.append(meta_gradient(library, model, x, y))
    close(*runs)
    assert all(g.abs().max() > 0 for n, g in runs[0][1].items() if "classifier" in n)


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("copied", ["pickle", "deepcopy", "clone_module"])
def test_copies(name, copied):
    model, x = make(models, name).eval(), images(name)
    copies = {
        "pickle": lambda: pickle.loads(pickle.dumps(model)),
        "deepcopy": lambda: copy.deepcopy(model),
        "clone_module": lambda: fastkfo.clone_module(model),
    }
    other = copies[copied]()
    if name in SMALL:
        with torch.no_grad():
            expected = model(x)
            for p in model.parameters():
                p.data = torch.zeros_like(p) if copied != "clone_module" else p.data
            close(other(x), expected)
    assert list(other.state_dict()) == list(model.state_dict())
    assert (next(other.parameters()).grad_fn is not None) == (copied == "clone_module")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "name", ["omniglot-fc-sizes", "omniglot-cnn-small", "cnn4-3", "basic-block"]
)
def test_vmap_over_models(name, training, device):
    nets = [make(models, name).to(device).train(training) for _ in range(2)]
    for i, net in enumerate(nets):
        for p in net.parameters():
            p.data.mul_(1 + i)
        for module in net.modules():  # else the running statistics forbid vmap in training
            if isinstance(module, nn.BatchNorm2d) and training:
                module.running_mean = module.running_var = module.num_batches_tracked = None
    if training and name == "basic-block":
        nets[0].drop_rate = nets[1].drop_rate = 0.0
    parameters, buffers = torch.func.stack_module_state(nets)
    x = images(name, device)

    def call(p, b):
        return torch.func.functional_call(nets[0], (p, b), (x,), tie_weights=False)

    close(torch.vmap(call)(parameters, buffers), torch.stack([net(x) for net in nets]))


def test_omniglot_cnn_takes_any_layout_of_its_images():
    model = make(models, "omniglot-cnn-small").eval()
    x = torch.randn(6, 1, 28, 28, dtype=torch.float64)
    expected = model(x)
    shapes = [(6, 784), (6, 28, 28), (6, 28, 28, 1), (2, 3, 1, 28, 28), (6, 1, 784)]
    for inputs in [x.reshape(shape) for shape in shapes]:
        close(model(inputs), expected)
    strided = x.transpose(2, 3).contiguous().transpose(2, 3)  # learn2learn crashes
    close(model(strided), expected)
    for shape in [(6, 3, 32, 32), (4, 1, 14, 14), (6, 1, 56, 56), (785,)]:
        with pytest.raises(ValueError, match=r"x: expected shape \[B, 1, 28, 28\]"):
            model(torch.zeros(shape, dtype=torch.float64))


def test_conv_base_takes_output_size_and_slices():
    seed(0)
    plain = models.ConvBase(hidden=4, layers=3)
    seed(0)
    named = models.ConvBase(output_size=64, hidden=4, layers=3)
    for a, b in zip(plain.parameters(), named.parameters(), strict=True):
        assert torch.equal(a, b)
    x = torch.randn(2, 1, 9, 9)
    assert torch.equal(plain[1:](plain[:1](x)), plain(x))
    assert plain[-1] is plain[2]


def test_empty_batch_and_small_images_in_evaluation():
    assert make(models, "cnn4").eval()(torch.zeros(0, 3, 84, 84).double()).shape == (0, 5)
    options = {"hidden_size": 640 * 4, "avg_pool": False}  # DropBlock's default 5 on maps of 4
    assert models.ResNet12(2, **options).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def run(model, size):
    return model(torch.zeros(2, 3, size, size))


M = models
BAD = {
    "layers 0": (lambda: M.ConvBase(layers=0), ValueError, "layers: expected at least 1, got 0"),
    "layers float": (lambda: M.ConvBase(layers=2.0), TypeError, "layers: .* got float"),
    "layers 5": (lambda: M.CNN4(2, layers=5), ValueError, "layers: expected at most 4"),
    "channels": (lambda: M.ConvBase(channels=True), TypeError, "channels: .*got bool"),
    "output_size": (lambda: M.CNN4(-1), ValueError, "output_size: .*got -1"),
    "hidden_size": (lambda: M.OmniglotCNN(5, "64"), TypeError, "hidden_size: .*got str"),
    "pool": (lambda: M.ConvBase(max_pool_factor=0.4), ValueError, "max_pool_factor: .*got 0.4"),
    "sizes": (lambda: M.OmniglotFC(4, 2, sizes=[]), ValueError, r"sizes: .*got \[\]"),
    "sizes int": (lambda: M.OmniglotFC(4, 2, sizes=3), TypeError, "sizes: .*got int"),
    "sizes 0": (lambda: M.OmniglotFC(4, 2, sizes=[3, 0]), ValueError, r"sizes\[1\]: .*got 0"),
    "embedding": (
        lambda: run(M.CNN4(2, hidden_size=4, layers=3), 84), ValueError,
        "embedding_size: expected 400, .*got 100"),
    "rate": (lambda: M.ResNet12(2, dropblock_dropout=1.5), ValueError, "dropblock_dropout: .*1.5"),
    "rate str": (lambda: M.ResNet12(2, embedding_dropout="a"), TypeError, "embedding_dropout"),
    "block": (lambda: M.ResNet12(2, dropblock_size=0), ValueError, "dropblock_size: .*got 0"),
    "block map": (
        lambda: M.resnet12.DropBlock(5)(torch.zeros(1, 1, 4, 6), gamma=0.1), ValueError,
        r"block_size: expected at most 4 for a feature map of \(4, 6\), got 5"),
    "gamma": (
        lambda: M.resnet12.DropBlock(1)(torch.zeros(1, 1, 1, 1), gamma=1.1), ValueError, "gamma"),
    "small": (lambda: run(M.ResNet12Backbone().eval(), 64), ValueError, "x: .*80 x 80"),
    "narrow": (
        lambda: run(M.ResNet12(2, wider=False).eval(), 80), ValueError,
        "hidden_size: expected 512, .*got 640"),
    "depth 4": (lambda: M.wrn28.WideResNet(4, 1, 0.0), ValueError, "depth: .*got 4"),
    "dropout": (lambda: M.WRN28(2, dropout=-0.1), ValueError, "dropout: .*got -0.1"),
    "wide small": (
        lambda: run(M.wrn28.WideResNet(10, 1, 0.0), 80), ValueError, "x: .*81 x 81"),
    "truncated": (
        lambda: M.truncated_normal_(torch.arange(2)), TypeError, "tensor: .*int64"),
    "init": (lambda: M.maml_init_(nn.ReLU()), TypeError, "module: .*got ReLU"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
