"""What other tools that fold networks get wrong, one test each."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, ConvNormAct
from timm.models import fastvit
from timm.models.byobnet import LayerFn, MobileOneBlock, RepVggBlock
from timm.models.repvit import RepVggDw
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tinydet.reparam import fold

from .reference_blocks import Amber, Basalt, assert_same, dense_kernel, equivalent_conv

_SIZES = ((2, 9, 9), (1, 1, 1), (3, 4, 7))  # (B, H, W)


class _Net(nn.Module):
    """Members in the order given, connected by a function: the two orders need not agree."""

    def __init__(self, way, **members):
        super().__init__()
        self.way = way
        for name, member in members.items():
            self.add_module(name, member)

    def forward(self, x):
        return self.way(self, x)


def _conv(kernel=3, channels=4, **kwargs):
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, **kwargs)


def _norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


def _convs(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def _check(model, x, randomise, sizes=_SIZES):
    """Fold a randomised float64 network and compare both at several sizes."""
    model = randomise(model.double()).eval()
    folded, report = fold(model, x)
    with torch.no_grad():
        assert_same(model(x), folded(x))
        for batch, height, width in sizes:
            other = 3 * torch.randn(batch, x.shape[1], height, width, dtype=torch.float64)
            assert_same(model(other), folded(other))
    assert report.norms_after == len(_norms(folded))
    return folded, report


def _x(channels=4):
    return torch.randn(2, channels, 9, 9, dtype=torch.float64)


# --- torch.fx's fuse -----------------------------------------------------------------------------


def test_conv_called_twice__each_output_has_its_own_norm(randomise):
    def way(m, x):
        return F.relu(m.n1(m.conv(x))) + F.relu(m.n2(m.conv(x.flip(3))))

    model = _Net(way, conv=_conv(), n1=nn.BatchNorm2d(4), n2=nn.BatchNorm2d(4))
    _check(model, _x(), randomise)


def test_conv_called_twice__equal_norms_do_not_change_the_structure(randomise):
    def way(m, x):
        return F.relu(m.n1(m.conv(x))) + F.relu(m.n2(m.conv(x.flip(3))))

    def net():
        members = {"conv": _conv(), "n1": nn.BatchNorm2d(4), "n2": nn.BatchNorm2d(4)}
        return _Net(way, **members).double().eval()

    fresh, _ = fold(net(), _x())  # Both norms are as yet the same map.
    trained, _ = fold(randomise(net()), _x())
    fresh.load_state_dict(trained.state_dict(), strict=True)
    x = _x()
    assert_same(trained(x).detach(), fresh(x).detach())


def test_conv_called_twice__one_output_has_a_norm(randomise):
    model = _Net(
        lambda m, x: F.relu(m.norm(m.conv(F.relu(m.conv(x))))), conv=_conv(), norm=nn.BatchNorm2d(4)
    )
    _check(model, _x(), randomise)


def test_conv_and_norm_called_twice(randomise):
    model = _Net(
        lambda m, x: m.norm(m.conv(F.relu(m.norm(m.conv(x))))), conv=_conv(), norm=nn.BatchNorm2d(4)
    )
    _check(model, _x(), randomise)


def test_conv_called_twice_in_a_row_then_a_norm(randomise):
    model = _Net(lambda m, x: m.norm(m.conv(m.conv(x))), conv=_conv(), norm=nn.BatchNorm2d(4))
    _check(model, _x(), randomise)


@pytest.mark.parametrize("rank", [2, 3])
def test_linear_and_norm__square(rank, randomise):
    # BatchNorm1d's channels are axis 1: those of the linear layer for (N, C), not for (N, L, C).
    model = randomise(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).double()).eval()
    x = torch.randn(5, *[6] * (rank - 1), dtype=torch.float64)
    folded, report = fold(model, x)
    assert_same(model(x).detach(), folded(x).detach())
    assert report.norms_after == len(_norms(folded)) == len(report.kept) == (rank == 3)


def test_linear_and_norm__flattened(randomise):
    def way(m, x):
        y = m.linear(x)
        return m.norm(y.flatten(0, 1)).view_as(y)

    model = _Net(way, linear=nn.Linear(6, 6), norm=nn.BatchNorm1d(6)).double()
    model = randomise(model).eval()
    x = torch.randn(2, 6, 6, dtype=torch.float64)
    folded, report = fold(model, x)
    y = torch.randn(3, 5, 6, dtype=torch.float64)
    assert_same([model(x).detach(), model(y).detach()], [folded(x).detach(), folded(y).detach()])
    assert report.norms_after == len(_norms(folded)) == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("legacy_xception", {}),  # features by hooks of its own accord
        ("repghostnet_050", {"feature_cls": "hook"}),
    ],
)
def test_features_by_hooks(name, options, randomise):
    model = timm.create_model(name, features_only=True, **options)
    assert type(model).__name__ == "FeatureHookNet"
    model = randomise(model).double().eval()
    folded, report = fold(model, torch.zeros(1, 3, 64, 64))
    x = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        expected, found = model(x), folded(x)
    assert [t.shape[1] for t in found] == list(model.feature_info.channels())
    assert_same(expected, found)
    assert report.norms_after < report.norms_before


class _Fork(nn.Module):
    """Two branches that can be merged, in a module that others may look into."""

    def __init__(self):
        super().__init__()
        self.stride, self.gain = 1, 3.0
        self.a = nn.Sequential(_conv(bias=False), nn.BatchNorm2d(4))
        self.b = nn.Sequential(_conv(1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x, gate=None):
        y = self.a(x) + self.b(x)
        return y if gate is None else y * gate.sigmoid()

    def doubled(self, x):
        return 2 * self(x)


class _ForkOfTensors(_Fork):
    def forward(self, x):
        y = self.a(x) + self.b(x)
        return y if isinstance(x, torch.Tensor) else 5 * y  # Not a tensor while it is traced.


class _ForkTimes(_Fork):
    def forward(self, x, factor):
        return self.a(x) * factor + self.b(x)


# How a network may use a block beside calling it with one tensor.
_USES = {
    "weight's dtype": lambda m, x: F.relu(m.fork(x.to(m.fork.a[0].weight.dtype))),
    "plain value": lambda m, x: F.relu(m.fork(x))[:, :, :: m.fork.stride] * m.fork.gain,
    "method": lambda m, x: F.relu(m.fork.doubled(x)),
    "branch alone": lambda m, x: F.relu(m.fork(x)) + m.fork.a(F.relu(x)),
    "keyword": lambda m, x: F.relu(m.fork(x=x)),
    "argument the second time": lambda m, x: m.fork(F.relu(m.fork(x)), x),
    "argument the first time": lambda m, x: m.fork(F.relu(m.fork(x, x))),
    "isinstance": lambda m, x: F.relu(m.of_tensors(x)),
    "number": lambda m, x: F.relu(m.times(x, 3)),
    "another number the second time": lambda m, x: m.times(F.relu(m.times(x, 1)), 2.5),
    "number from the size": lambda m, x: F.relu(m.times(x, x.shape[2])),
    "same tensor twice": lambda m, x: m.times(F.relu(m.times(x, x.mean())), F.relu(x)),
    "path by size": lambda m, x: F.relu(m.fork(x)) if x.shape[2] > 5 else m.fork(F.relu(x)),
}


@pytest.mark.parametrize("use", _USES)
def test_block_used_in_an_unusual_way(use, randomise):
    model = _Net(_USES[use], fork=_Fork(), of_tensors=_ForkOfTensors(), times=_ForkTimes())
    _check(model, _x(), randomise)


def _doubles(module, args, output):
    del module, args
    return 2 * output


def _adds_its_input(module, args, output):
    del module
    return args[0] + output


def _doubles_input(module, args):
    del module
    return (2 * args[0],)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("where", ["fork", "fork.a", "fork.b.0", "fork.a.1"])
@pytest.mark.parametrize("hook", [_doubles, _adds_its_input, _doubles_input])
def test_hooks_that_change_tensors(where, hook, randomise):
    model = _Net(lambda m, x: F.relu(m.fork(x)), fork=_Fork())
    module = model.get_submodule(where)
    if hook is _doubles_input:
        module.register_forward_pre_hook(hook)
    else:
        module.register_forward_hook(hook)
    _check(model, _x(), randomise)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_parametrized_weight(norm, randomise):
    fork = _Fork()
    getattr(nn.utils.parametrizations, norm)(fork.a[0])
    _check(nn.Sequential(fork, nn.ReLU()), _x(), randomise)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_mode(mode, randomise):
    fork = _Fork()
    fork.a[0] = _conv(padding_mode=mode)
    _check(nn.Sequential(fork, nn.ReLU()), _x(), randomise, sizes=((1, 4, 7), (3, 9, 2)))


@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_same_padding(kernel, randomise):
    # With an even kernel it is asymmetric, which no padding of nn.Conv2d is.
    fork = _Fork()
    fork.a[0] = nn.Conv2d(4, 4, kernel, padding="same")
    _check(nn.Sequential(fork, nn.ReLU()), _x(), randomise)


@pytest.mark.parametrize("axes", [1, 3])
def test_other_dimensions(axes, randomise):
    conv, norm = getattr(nn, f"Conv{axes}d"), getattr(nn, f"BatchNorm{axes}d")
    fork = _Fork()
    fork.a = nn.Sequential(conv(4, 4, 3, padding=1), norm(4))
    fork.b = nn.Sequential(conv(4, 4, 1), norm(4))
    model = randomise(nn.Sequential(fork, nn.ReLU()).double()).eval()
    folded, _ = fold(model, torch.randn(2, 4, *[6] * axes, dtype=torch.float64))
    assert _norms(folded) == []
    for size in (1, 2, 7):
        x = torch.randn(3, 4, *[size] * axes, dtype=torch.float64)
        assert_same(model(x).detach(), folded(x).detach())


def test_image_without_a_batch_axis(randomise):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = _conv(), _conv(1)

        def forward(self, x):
            return F.relu(self.a(x) + self.b(x))

    model = randomise(Sum().double()).eval()
    for example in (torch.randn(4, 9, 9), torch.randn(2, 4, 9, 9)):
        folded, _ = fold(model, example)
        for x in (torch.randn(4, 5, 3).double(), torch.randn(3, 4, 5, 3).double()):
            assert_same(model(x).detach(), folded(x).detach())


def test_two_inputs_that_are_one_tensor_in_the_example(randomise):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = _conv(), _conv(1)

        def forward(self, x, y):
            return F.relu(self.a(x) + self.b(y))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two()

        def forward(self, x, y):
            return self.two(self.two(x, x), y)

    x, y = _x(), _x()
    for model in (Two(), Outer()):
        model = randomise(model.double()).eval()
        folded, _ = fold(model, (x, x))
        assert_same(model(x, y).detach(), folded(x, y).detach())


# --- a walk over children ------------------------------------------------------------------------


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.LeakyReLU])
def test_norm_with_activation__activation_stays(act, randomise):
    model = nn.Sequential(_conv(bias=False), BatchNormAct2d(4, act_layer=act), _conv())
    folded, _ = _check(model, _x(), randomise)
    assert _norms(folded) == []
    assert [m for m in folded.modules() if isinstance(m, act)]
    assert len(_convs(folded)) == 2


def test_norm_with_activation__in_a_branch(randomise):
    model = _Net(
        lambda m, x: m.a(x) + m.b(x),
        a=nn.Sequential(_conv(), BatchNormAct2d(4)),
        b=nn.Sequential(_conv(1), BatchNormAct2d(4, apply_act=False)),
    )
    folded, _ = _check(model, _x(), randomise)
    assert _norms(folded) == []
    assert len(_convs(folded)) == 2


def test_child_order_is_not_data_flow(randomise):
    members = {"n1": nn.BatchNorm2d(4), "c2": _conv(), "c1": _conv(), "n2": nn.BatchNorm2d(4)}
    model = _Net(lambda m, x: m.n2(m.c2(F.relu(m.n1(m.c1(x))))), **members)
    folded, _ = _check(model, _x(), randomise)
    assert _norms(folded) == []
    model = _Net(lambda m, x: m.c1(F.relu(m.c2(F.relu(m.n2(m.n1(x)))))), **members)
    _check(model, _x(), randomise)


def test_norm_without_its_conv(randomise):
    # Registered side by side, never run one after the other.
    model = _Net(lambda m, x: F.relu(m.conv(x)) * m.norm(x), conv=_conv(), norm=nn.BatchNorm2d(4))
    _check(model, _x(), randomise)


# --- timm's reparameterize_model -----------------------------------------------------------------

_OWN_METHODS = {
    "levit_128s": ({}, 224),
    "tiny_vit_5m_224": ({"features_only": True}, 64),
    "efficientvit_m0": ({"features_only": True}, 64),
}


@pytest.mark.parametrize("name", _OWN_METHODS)
def test_dtype__float64(name, randomise):
    options, size = _OWN_METHODS[name]
    model = randomise(timm.create_model(name, **options)).double().eval()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    folded, report = fold(model, x[:1])
    assert {t.dtype for t in folded.state_dict().values() if t.is_floating_point()} == {x.dtype}
    assert report.norms_after < report.norms_before
    with torch.no_grad():
        assert_same(model(x), folded(x))


@pytest.mark.parametrize("name", _OWN_METHODS)
def test_dtype__bfloat16(name):
    options, size = _OWN_METHODS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, **options).bfloat16().eval()
    x = torch.randn(1, 3, size, size).bfloat16()
    folded, _ = fold(model, x)
    kinds = {t.dtype for t in folded.state_dict().values() if t.is_floating_point()}
    assert kinds == {torch.bfloat16}
    with torch.no_grad():
        expected, found = model(x), folded(x)
        if isinstance(found, torch.Tensor):
            expected, found = [expected], [found]
        for a, b in zip(expected, found, strict=True):
            assert b.dtype == torch.bfloat16
            a, b = a.double(), b.double()
            assert (a - b).norm() < 0.1 * a.norm()  # bfloat16 has 8 bits, and layers add up.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype__of_merged_branches(dtype, randomise):
    model = randomise(nn.Sequential(Amber(), Basalt(groups=8))).to(dtype).eval()
    x = torch.randn(1, 8, 9, 9, dtype=dtype)
    folded, _ = fold(model, x)
    assert len(_convs(folded)) == 2
    assert {p.dtype for p in folded.parameters()} == {dtype}
    with torch.no_grad():
        expected, found = model(x), folded(x)
    assert found.dtype == dtype
    error = (expected.double() - found.double()).abs().max() / expected.double().abs().max()
    assert error < 50 * torch.finfo(dtype).eps


def test_synchronized_norms(randomise):
    for block in (Amber(), Basalt(groups=2), MobileOneBlock(8, 8, layers=_layers())):
        model = timm.layers.convert_sync_batchnorm(nn.Sequential(block))
        assert any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
        folded, _ = _check(model, _x(8), randomise)
        assert _norms(folded) == []
        assert len(_convs(folded)) == 1


@pytest.mark.parametrize("name", ["fastvit_t8", "mobileone_s0"])
def test_folding_twice(name, randomise):
    model = randomise(timm.create_model(name, features_only=True)).eval()
    once, _ = fold(model, torch.zeros(1, 3, 64, 64))
    twice, report = fold(once, torch.zeros(1, 3, 64, 64))
    assert report.folded == ()
    assert report.macs_after == report.macs_before
    state = twice.state_dict()
    assert state.keys() == once.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in once.state_dict().items())
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(once(x), twice(x), strict=True):
        assert torch.equal(a, b)


def test_timms_own_result_can_be_folded(randomise):
    model = nn.Sequential(RepVggBlock(8, 8, layers=_layers())).double()
    model = timm.models.reparameterize_model(randomise(model).eval()).eval()
    folded, _ = fold(model, _x(8))
    assert_same(model(_x(8) * 0 + 1).detach(), folded(_x(8) * 0 + 1).detach())


def test_training_mode_is_refused():
    model = nn.Sequential(Amber(), Amber())
    with pytest.raises(ValueError, match=r"training mode.*eval\(\)"):
        fold(model.train(), _x(8).float())
    model.eval()
    model[1].b.train()
    with pytest.raises(ValueError, match=r"1\.b"):
        fold(model, _x(8).float())


def _layers():
    return LayerFn(conv_norm_act=ConvNormAct, norm_act=BatchNormAct2d, act=nn.ReLU)


@pytest.mark.parametrize("dilation", [(2, 2), (1, 2)])
def test_mobileone_block_whose_branches_ignore_the_dilation(dilation, randomise):
    block = MobileOneBlock(8, 8, dilation=dilation, num_conv_branches=2, layers=_layers())
    folded, _ = _check(block, _x(8), randomise)
    (conv,) = _convs(folded)
    assert (conv.kernel_size, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1))


@pytest.mark.parametrize("groups", [1, 8])
def test_dilated_branches_make_a_dilated_conv(groups, randomise):
    # As a dense 5x5 kernel it would cost more than the branches do.
    block = Basalt(groups=groups, dilation=2, copies=2)
    folded, report = _check(nn.Sequential(block), _x(8), randomise)
    (conv,) = _convs(folded)
    assert (conv.kernel_size, conv.padding, conv.dilation) == ((3, 3), (2, 2), (2, 2))
    assert conv.groups == groups
    assert report.macs_after <= report.macs_before
    linear = copy.deepcopy(block)
    linear.z = nn.Identity()
    kernel, bias = equivalent_conv(linear, 8, reach=2)
    assert_same(kernel[:, :, ::2, ::2], dense_kernel(conv))
    assert_same(bias, conv.bias.detach())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("root", [False, True])
def test_repvit_block__other_kernels(kernel, legacy, root, randomise):
    block = RepVggDw(8, kernel, legacy=legacy)
    folded, _ = _check(block if root else nn.Sequential(block, nn.ReLU()), _x(8), randomise)
    (conv,) = _convs(folded)
    assert (conv.kernel_size, conv.groups) == ((kernel, kernel), 8)
    assert _norms(folded) == []


_BLOCKS = {
    "repvgg": lambda: RepVggBlock(8, 8, layers=_layers()),
    "repvgg stride": lambda: RepVggBlock(8, 12, stride=2, layers=_layers()),
    "repvgg groups": lambda: RepVggBlock(8, 8, group_size=2, layers=_layers()),
    "repvgg dilation": lambda: RepVggBlock(8, 8, dilation=(2, 2), layers=_layers()),
    "repvgg kernel": lambda: RepVggBlock(8, 8, kernel_size=5, layers=_layers()),
    "mobileone": lambda: MobileOneBlock(8, 8, num_conv_branches=4, layers=_layers()),
    "mobileone depthwise": lambda: MobileOneBlock(8, 8, group_size=1, layers=_layers()),
    "mobileone 1x1": lambda: MobileOneBlock(8, 8, kernel_size=1, layers=_layers()),
    "fastvit mixer": lambda: fastvit.RepMixer(8, 3),
    "fastvit position": lambda: fastvit.RepConditionalPosEnc(8),
    "fastvit large": lambda: fastvit.ReparamLargeKernelConv(8, 8, 7, 1, 1, small_kernel=3),
}


@pytest.mark.parametrize("kind", _BLOCKS)
def test_block_as_root(kind, randomise):
    block = _BLOCKS[kind]()
    for module in block.modules():
        if hasattr(module, "gamma"):
            nn.init.normal_(module.gamma)
    folded, report = _check(block, _x(8), randomise)
    assert _norms(folded) == []
    assert report.branches_after == 0
    assert len(_convs(folded)) == 1
    _check_nothing_unused(folded, _x(8))


# --- what is left behind -------------------------------------------------------------------------


class _Reads(TorchDispatchMode):
    """Memory that any operation is given."""

    def __init__(self):
        super().__init__()
        self.memory = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                self.memory.add(value.untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


def _check_nothing_unused(model, x):
    """Every tensor a module holds is in its state, and read in a forward pass."""
    with torch.no_grad(), _Reads() as reads:
        model(x)
    known = {id(t) for t in (*model.parameters(), *model.buffers())}
    for name, module in model.named_modules():
        held = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_modules")}
        for value in torch.utils._pytree.tree_leaves(held):
            assert not isinstance(value, torch.Tensor) or id(value) in known, name
    for key, tensor in model.state_dict(keep_vars=True).items():
        assert tensor.untyped_storage().data_ptr() in reads.memory, key
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{key} is part of more memory"


# --- names in published checkpoints --------------------------------------------------------------

_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _conv_norm_names(name):
    return {f"{name}.conv.weight", *(f"{name}.bn.{n}" for n in _NORM)}


def _repvgg_a0_names():
    names = {"head.fc.weight", "head.fc.bias"}
    blocks = ["stem"] + [f"stages.{i}.{j}" for i, d in enumerate((2, 4, 14, 1)) for j in range(d)]
    for block in blocks:
        names |= _conv_norm_names(f"{block}.conv_kxk") | _conv_norm_names(f"{block}.conv_1x1")
        if block != "stem" and not block.endswith(".0"):
            names |= {f"{block}.identity.{n}" for n in _NORM}
    return names


def _mobileone_s0_names():
    names = {"head.fc.weight", "head.fc.bias"}
    names |= _conv_norm_names("stem.conv_kxk.0") | _conv_norm_names("stem.conv_scale")
    for stage, depth in enumerate((2, 8, 10, 1)):
        for i in range(2 * depth):  # depthwise 3x3, then 1x1
            block = f"stages.{stage}.{i}"
            for copy_ in range(4):
                names |= _conv_norm_names(f"{block}.conv_kxk.{copy_}")
            if i % 2 == 0:
                names |= _conv_norm_names(f"{block}.conv_scale")
            # The first block halves the image, the second widens; in S0's first stage it does not.
            if i > 1 or (stage, i) == (0, 1):
                names |= {f"{block}.identity.{n}" for n in _NORM}
    return names


def _as_published_by_fastvits_authors(state):
    """Give timm's FastViT weights the names of the original repository, MobileOne's among them."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("stem", "patch_embed").replace("final_conv", "conv_exp")
        key = key.replace("conv_kxk", "rbr_conv").replace("conv_scale", "rbr_scale")
        key = key.replace("identity", "rbr_skip").replace("large_conv", "lkb_origin")
        key = key.replace("mlp", "convffn").replace("head.fc.", "head.")
        key = key.replace("se.fc1", "se.reduce").replace("se.fc2", "se.expand")
        key = key.replace("layer_scale.gamma", "layer_scale")
        key = re.sub(r"stages\.(\d)\.blocks", lambda m: f"network.{2 * int(m[1])}", key)
        key = re.sub(r"stages\.(\d)\.downsample", lambda m: f"network.{2 * int(m[1]) - 1}", key)
        renamed[key] = value
    return renamed


@pytest.mark.parametrize(
    ("name", "published"), [("repvgg_a0", _repvgg_a0_names), ("mobileone_s0", _mobileone_s0_names)]
)
def test_published_names_load_and_nothing_unused_is_left(name, published, randomise):
    trained = randomise(timm.create_model(name), seed=3).eval()
    assert set(trained.state_dict()) == published()
    folded, report = _loaded_and_folded(name, trained, dict(trained.state_dict()))
    _check_nothing_unused(folded, torch.zeros(1, 3, 64, 64))
    layers = [m for m in folded.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    size = sum(m.weight.numel() + m.bias.numel() for m in layers)
    assert sum(t.numel() for t in folded.state_dict().values()) == size == report.params_after
    assert len(pickle.dumps(folded)) < 4 * size + 200_000


def test_original_names_load_before_folding(randomise):
    # timm knows the original names of FastViT and its MobileOne blocks, and none of RepVGG's.
    trained = randomise(timm.create_model("fastvit_t8"), seed=3).eval()
    original = _as_published_by_fastvits_authors(trained.state_dict())
    assert "patch_embed.0.rbr_conv.0.conv.weight" in original
    assert "network.0.0.token_mixer.mixer.rbr_skip.weight" in original
    assert "network.1.proj.0.lkb_origin.conv.weight" in original
    renamed = fastvit.checkpoint_filter_fn(original, trained)
    _loaded_and_folded("fastvit_t8", trained, renamed)


def _loaded_and_folded(name, trained, state):
    """Load weights into a fresh model, fold it, and compare it with the one they are from."""
    fresh = timm.create_model(name)
    fresh.load_state_dict(state, strict=True)
    x = torch.randn(1, 3, 64, 64)
    folded, report = fold(fresh.eval(), x)
    assert report.norms_after == 0
    with torch.no_grad():
        assert_same(trained(x), folded(x), tolerance=1e-3)  # float32, some twenty layers deep
    return folded, report
