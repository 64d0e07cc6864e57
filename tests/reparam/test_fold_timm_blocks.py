"""Blocks and dtypes that timm's own re-parameterization handles or does not."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, ConvNormAct
from timm.models import fastvit
from timm.models.byobnet import LayerFn, MobileOneBlock, RepVggBlock
from timm.models.repvit import RepVggDw
from torch import nn

from tinydet.reparam import fold

from .reference_blocks import Amber, Basalt, assert_same, dense_kernel, equivalent_conv
from .small_networks import check_nothing_unused, convs_of, example, fold_and_compare, norms_of

_OWN_METHODS = {
    "levit_128s": ({}, 224),
    "tiny_vit_5m_224": ({"features_only": True}, 64),
    "efficientvit_m0": ({"features_only": True}, 64),
}


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert len(convs_of(folded)) == 2
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
        folded, _ = fold_and_compare(model, example(8), randomise)
        assert norms_of(folded) == []
        assert len(convs_of(folded)) == 1


@pytest.mark.slow
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
    folded, _ = fold(model, example(8))
    assert_same(model(example(8) * 0 + 1).detach(), folded(example(8) * 0 + 1).detach())


def test_training_mode_is_refused():
    model = nn.Sequential(Amber(), Amber())
    with pytest.raises(ValueError, match=r"training mode.*eval\(\)"):
        fold(model.train(), example(8).float())
    model.eval()
    model[1].b.train()
    with pytest.raises(ValueError, match=r"1\.b"):
        fold(model, example(8).float())


def _layers():
    return LayerFn(conv_norm_act=ConvNormAct, norm_act=BatchNormAct2d, act=nn.ReLU)


@pytest.mark.parametrize("dilation", [(2, 2), (1, 2)])
def test_mobileone_block_whose_branches_ignore_the_dilation(dilation, randomise):
    block = MobileOneBlock(8, 8, dilation=dilation, num_conv_branches=2, layers=_layers())
    folded, _ = fold_and_compare(block, example(8), randomise)
    (conv,) = convs_of(folded)
    assert (conv.kernel_size, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1))


@pytest.mark.parametrize("groups", [1, 8])
def test_dilated_branches_make_a_dilated_conv(groups, randomise):
    # As a dense 5x5 kernel it would cost more than the branches do.
    block = Basalt(groups=groups, dilation=2, copies=2)
    folded, report = fold_and_compare(nn.Sequential(block), example(8), randomise)
    (conv,) = convs_of(folded)
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
    folded, _ = fold_and_compare(
        block if root else nn.Sequential(block, nn.ReLU()), example(8), randomise
    )
    (conv,) = convs_of(folded)
    assert (conv.kernel_size, conv.groups) == ((kernel, kernel), 8)
    assert norms_of(folded) == []


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
    folded, report = fold_and_compare(block, example(8), randomise)
    assert norms_of(folded) == []
    assert report.branches_after == 0
    assert len(convs_of(folded)) == 1
    check_nothing_unused(folded, example(8))
