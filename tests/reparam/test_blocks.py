"""Blocks with their own re-parameterization, the right and the wrong ones."""

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, ConvNormAct
from timm.models.byobnet import LayerFn, MobileOneBlock, RepVggBlock
from timm.models.repvit import RepVggDw
from torch import nn

from tinydet.reparam import fold


def _layers():
    return LayerFn(conv_norm_act=ConvNormAct, norm_act=BatchNormAct2d, act=nn.ReLU)


_BLOCKS = {
    "repvgg": lambda: RepVggBlock(8, 8, layers=_layers()),
    "repvgg strided": lambda: RepVggBlock(8, 12, stride=2, layers=_layers()),
    "repvgg grouped": lambda: RepVggBlock(8, 8, group_size=2, layers=_layers()),
    "mobileone": lambda: MobileOneBlock(8, 8, num_conv_branches=3, layers=_layers()),
    "mobileone depthwise": lambda: MobileOneBlock(8, 8, group_size=1, layers=_layers()),
    "repvit depthwise": lambda: RepVggDw(8, 3),
}


@pytest.mark.parametrize("kind", _BLOCKS)
@pytest.mark.parametrize("root", [True, False])
def test_block(kind, root, check_fold):
    block = _BLOCKS[kind]().double()
    model = block if root else nn.Sequential(nn.Conv2d(8, 8, 1).double(), block)
    folded, report = check_fold(model, torch.randn(2, 8, 9, 9, dtype=torch.float64))
    assert len([m for m in folded.modules() if isinstance(m, nn.Conv2d)]) == (1 if root else 2)
    assert report.kept == ()


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


class _Crashes(_Block):
    def reparameterize(self):
        self.conv = None
        raise RuntimeError("cannot")


class _Wrong(_Block):
    def reparameterize(self):
        self.norm = nn.Identity()


class _ReturnsNothing(_Block):
    def fuse(self):
        pass


@pytest.mark.parametrize("block", [_Crashes, _Wrong, _ReturnsNothing])
def test_faulty_method_leaves_the_block_to_the_data_flow(block, check_fold):
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    folded, report = check_fold(nn.Sequential(block()).double(), x)
    assert type(folded[0]) is block
    assert [step.name for step in report.folded] == ["0.norm"]


def test_block_that_keeps_norms_is_named_with_the_reason(check_fold):
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(x)

        def fuse(self):
            raise RuntimeError("no idea how\nsecond line")

    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    _, report = check_fold(nn.Sequential(Shuffled()).double(), x, left=1)
    assert report.kept[0].detail == "Shuffled could not re-parameterize itself: no idea how"


def test_nested_blocks(check_fold):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.tail = RepVggBlock(4, 4, layers=_layers()), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.tail(self.inner(x))

        def fuse(self):
            return nn.Sequential(self.inner, self.tail)

    check_fold(nn.Sequential(Outer()).double(), torch.randn(1, 4, 6, 6, dtype=torch.float64))


def test_new_layers_without_dtype_are_float64(check_fold):
    class Careless(_Block):
        def fuse(self):
            scale = self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)
            conv = nn.Conv2d(4, 4, 3)  # float32, unless the default says otherwise
            conv.weight.data.copy_(self.conv.weight * scale[:, None, None, None])
            conv.bias.data.copy_(self.norm.bias - self.norm.running_mean * scale)
            return conv

    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    folded, _ = check_fold(nn.Sequential(Careless()).double(), x)
    assert type(folded[0]) is nn.Conv2d
    assert torch.get_default_dtype() is torch.float32


def test_no_stray_tensors(randomise):
    block = randomise(RepVggBlock(16, 16, layers=_layers())).eval()
    timm_folded = timm.models.reparameterize_model(nn.Sequential(block).eval())
    assert hasattr(timm_folded[0], "id_tensor")  # The fault this is about.
    for model in (nn.Sequential(block).eval(), timm_folded.eval()):
        folded, _ = fold(model, torch.randn(1, 16, 8, 8))
        for module in folded.modules():
            assert not [k for k, v in vars(module).items() if isinstance(v, torch.Tensor)]


def test_hook_on_a_block_survives_its_fuse(check_fold):
    class Doubles:
        def __call__(self, *args):
            return args[-1] * 2

    class Fusing(_Block):
        def fuse(self):
            return torch.nn.utils.fuse_conv_bn_eval(self.conv, self.norm)

    model = nn.Sequential(Fusing()).double()
    model[0].register_forward_hook(Doubles())
    folded, _ = check_fold(model, torch.randn(2, 4, 6, 6, dtype=torch.float64))
    assert type(folded[0]) is nn.Conv2d
