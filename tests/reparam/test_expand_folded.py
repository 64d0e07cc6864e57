"""A folded network can get branches, be trained, and be folded again to its own architecture."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from tinydet.reparam import expand, expanded_names, fold


def _trained(model, steps):
    """Train on one batch; return the losses and the gradients of the last step."""
    torch.manual_seed(1)
    images, labels = torch.randn(8, 3, 64, 48), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)  # A folded network has no norms.
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.grad for name, p in model.eval().named_parameters()}


def _architecture(model):
    convs = {
        name: (type(m), m.kernel_size, m.stride, m.padding, m.dilation, m.groups)
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    }
    return convs, {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "block", "where"),
    [
        ("test_byobnet", "dbb", ""),
        ("test_efficientnet", "mobileone", "depthwise 3x3"),
        ("test_resnet", "acnet", "layer2 layer3.0.conv1"),
        pytest.param("repvgg_a0", "repvgg", "stages.*.reparam_conv", marks=pytest.mark.slow),
        pytest.param("mobileone_s0", "mobileone", "depthwise", marks=pytest.mark.slow),
        pytest.param("resnet18", "dbb", "layer1 layer2", marks=pytest.mark.slow),
        pytest.param("mobilenetv3_small_050", "acnet", "", marks=pytest.mark.slow),
    ],
)
def test_a_folded_network_is_trained_with_branches_and_folded_again(name, block, where):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, drop_rate=0.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5  # Few steps are enough for the statistics.
    _trained(model, steps=6)
    example = torch.randn(1, 3, 64, 48)
    folded, first = fold(model, example)
    expanded = expand(folded, block, where)
    assert expanded_names(expanded)
    assert expanded_names(folded) == []
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(expanded.eval()(x), folded(x))
    losses, gradients = _trained(expanded, steps=4)
    assert losses[-1] < losses[0]
    new = {name for name in gradients if ".branches." in name}
    assert all(gradients[name].abs().sum() > 0 for name in new)
    expanded = pickle.loads(pickle.dumps(copy.deepcopy(expanded))).double()
    again, second = fold(expanded, example)
    with torch.no_grad():
        expected = expanded(x.double())
        torch.testing.assert_close(again(x.double()), expected, rtol=1e-9, atol=1e-9)
        before = folded.double()(x.double())
        assert (expected - before).abs().max() > 1e-4 * before.abs().max()
    assert second.kept == first.kept
    assert second.macs_after == first.macs_after
    assert second.params_after == first.params_after
    assert _architecture(again) == _architecture(folded)
    folded.load_state_dict(again.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(folded(x.double()), expected, rtol=1e-9, atol=1e-9)


class _Gated(nn.Module):
    """Branches in the middle of its code, which the fold rewrites."""

    def __init__(self):
        super().__init__()
        self.one, self.three = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.gate = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = torch.relu(self.one(x) + self.three(x))
        return x + y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()


@pytest.mark.parametrize("where", ["*.reparam_conv", "3x3", "1"])
def test_convs_in_rewritten_code_get_branches_by_their_new_names(where, randomise):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), _Gated()).double().eval()
    folded, _ = fold(model, torch.zeros(2, 4, 9, 9))
    expanded = randomise(expand(folded, "dbb", where)).eval()
    assert "1.reparam_conv" in expanded_names(expanded)
    expanded = pickle.loads(pickle.dumps(copy.deepcopy(expanded)))
    again, report = fold(expanded, torch.zeros(2, 4, 9, 9))
    assert report.kept == ()
    assert _architecture(again) == _architecture(folded)
    x = torch.randn(3, 4, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(again(x), expanded(x), rtol=1e-9, atol=1e-9)
