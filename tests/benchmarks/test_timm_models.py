import pytest
import timm
import torch
from timm_models import (
    build_model,
    choose_models,
    example_images,
    family_of,
    input_sizes,
    randomise,
    settle_norms,
)
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d


class _Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        self.batch_norm = nn.BatchNorm2d(16)
        self.bare_norm = nn.BatchNorm2d(16, affine=False)
        self.group_norm = nn.GroupNorm(4, 16)
        self.layer_norm = nn.LayerNorm(16)
        self.frozen = FrozenBatchNorm2d(16)
        self.gamma = nn.Parameter(1e-5 * torch.ones(16))
        self.layer_scale = nn.Parameter(torch.ones(1, 16, 1, 1))
        self.position = nn.Parameter(torch.zeros(1, 4, 16))


def test_randomise__every_norm_and_constant_parameter():
    model = _Everything()
    randomise(model, seed=3)
    state = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    assert len(state) == 19
    for name, tensor in state.items():
        assert len(tensor.unique()) >= 16, name
        size = tensor.square().mean().sqrt().item()
        assert 0.05 < size < 5, (name, size)
        if "var" in name:
            assert tensor.min() >= 0.5
        else:
            assert tensor.min() < 0 < tensor.max(), name
    for scale in ("gamma", "layer_scale", "batch_norm.weight", "layer_norm.weight"):
        assert state[scale].abs().min() >= 0.5, scale


@pytest.mark.parametrize("name", ["fastvit_t8", "test_convnext", "test_maxvit", "swiftformer_xs"])
def test_build_model__nothing_constant_is_left(name):
    model = build_model(name)
    plain = timm.create_model(name, features_only=True).state_dict()
    state = model.state_dict()
    assert state.keys() == plain.keys()
    for key, tensor in state.items():
        if "running" in key or (key.endswith((".bias", "gamma")) and tensor.numel() > 1):
            assert len(tensor.unique()) > 1, key
            assert not torch.equal(tensor, plain[key]), key
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            assert (module.weight < 0).any()
            assert (module.weight > 0).any()


def test_build_model__same_weights_again_and_no_other_randomness_touched():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = build_model("test_resnet").state_dict(), build_model("test_resnet").state_dict()
    assert torch.equal(torch.rand(1), expected)
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


def test_settle_norms__a_deep_network_keeps_its_signal():
    torch.manual_seed(0)
    # Branch upon branch: with statistics of their own choice the signal doubles each time.
    blocks = [_Doubling(8) for _ in range(60)]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *blocks).eval()
    images = torch.randn(2, 3, 16, 16)
    randomise(model, seed=1)
    with torch.no_grad():
        assert model(images).abs().max() > 1e4
        settle_norms(model, images, seed=1)
        size = model(images).square().mean().sqrt()
    assert 0.1 < size < 10
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(len(norm.running_mean.unique()) == 8 for norm in norms)
    assert all((norm.running_var > 0).all() for norm in norms)


class _Doubling(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.norm(2 * x)


def test_choose_models():
    sample = choose_models([])
    assert len(sample) >= 220
    assert len({family_of(name) for name in sample}) >= 57
    assert set(sample) <= set(timm.list_models())
    assert choose_models(["repvgg_a?", "rexnet_100", "repvgg_a0"]) == [
        "repvgg_a0",
        "repvgg_a1",
        "repvgg_a2",
        "rexnet_100",
    ]
    with pytest.raises(ValueError, match=r"^repvg: .* try '\*repvg\*'"):
        choose_models(["rexnet_100", "repvg"])


def test_input_sizes():
    assert input_sizes("levit_128s") == [224]
    assert input_sizes("vit_base_patch16_384") == [256, 384]
    assert input_sizes("resnet34") == [224]


def test_example_images():
    images = example_images("resnet18", 2, 32, 64)
    assert images.shape == (2, 3, 32, 64)
    assert torch.equal(images, example_images("resnet18", 2, 32, 64))
    assert not torch.equal(images, example_images("resnet34", 2, 32, 64))
