import torch
from random_weights import randomise, settle_norms
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
