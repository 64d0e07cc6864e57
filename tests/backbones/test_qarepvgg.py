"""QARepVGG against the paper's block, and what it is for: channels that are rarely active."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.byobnet import RepVggBlock
from torch import nn

import tinydet.backbones  # noqa: F401
from tinydet.config import ConfigError, Model
from tinydet.reparam import fold
from tinydet.yolof.build import build_detector


def _randomise(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.3, 3.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.double().eval()


def _normalised(x, norm):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


def _paper(block, x):
    """Eq. 8 and table 3 (S4): one norm in the 3x3 branch, one after the sum, then ReLU."""
    conv, pointwise = block.conv_kxk.conv, block.conv_1x1.conv
    y = _normalised(F.conv2d(x, conv.weight, None, conv.stride, 1), block.conv_kxk.bn)
    y = y + F.conv2d(x, pointwise.weight, None, pointwise.stride)
    if y.shape == x.shape and conv.stride == (1, 1):
        y = y + x
    return _normalised(y, block.attn).relu()


@pytest.mark.parametrize("name", ["qarepvgg_a0", "qarepvgg_b0"])
def test_every_block_is_the_papers(name):
    torch.manual_seed(0)
    model = _randomise(timm.create_model(name, features_only=True))
    blocks = [m for m in model.modules() if isinstance(m, RepVggBlock)]
    plain = timm.create_model(name[2:], features_only=True)
    assert len(blocks) == sum(isinstance(m, RepVggBlock) for m in plain.modules())
    with torch.no_grad():
        for block in blocks:
            x = torch.randn(2, block.conv_kxk.conv.in_channels, 9, 8, dtype=torch.float64)
            torch.testing.assert_close(block(x), _paper(block, x))


def test_it_folds_into_the_convs_of_repvgg():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    folded = []
    for name in ("qarepvgg_a0", "repvgg_a0"):
        model = _randomise(timm.create_model(name, features_only=True))
        small, report = fold(model, x)
        assert (report.norms_after, report.branches_after) == (0, 0)
        folded.append({n: t.shape for n, t in small.state_dict().items()})
        with torch.no_grad():
            for a, b in zip(small(x), model(x), strict=True):
                torch.testing.assert_close(a, b)
    assert folded[0] == folded[1]


@pytest.mark.parametrize(("name", "collapses"), [("repvgg_a0", True), ("qarepvgg_a0", False)])
def test_a_channel_that_is_rarely_active(name, collapses):
    """Statistics of many steps without it must not blow up its value in evaluation."""
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True)
    block = next(
        m for m in model.modules() if isinstance(m, RepVggBlock) and m.identity is not None
    ).train()
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_parameters()
    channels = block.conv_kxk.conv.in_channels
    active = torch.ones(channels, 1, 1)
    active[0] = 0
    with torch.no_grad():
        for _ in range(300):
            block(torch.randn(2, channels, 8, 8).relu() * active)
        x = torch.randn(2, channels, 8, 8).relu()
        evaluated = block.eval()(x)[:, 0].max()
        trained = block.train()(x)[:, 0].max()
    assert (evaluated > 30 * trained) == collapses


def test_there_are_no_weights_for_it():
    model = Model(backbone="qarepvgg_a0", weights="imagenet")
    with pytest.raises(ConfigError, match="no weights for qarepvgg_a0"):
        build_detector(model, ("a",))
