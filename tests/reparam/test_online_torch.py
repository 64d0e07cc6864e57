"""An online network as PyTorch's users expect of a network: copied, saved, compiled, averaged."""

import copy
import io
from functools import partial

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import tinydet.reparam.online
from tinydet.reparam import BLOCKS, expand, expanded_names, fold
from tinydet.reparam.branches import ChannelScale
from tinydet.training.ema import AveragedWeights
from tinydet.training.precision import prepare_for_cpu

from .beside import random_scales, small_network

online = partial(expand, online=True)
X = torch.randn(2, 3, 40, 44, dtype=torch.float64)


@pytest.fixture
def grown():
    torch.manual_seed(0)
    return random_scales(online(small_network().double(), "dbb"))


def _same(one, other, x=X):
    with torch.no_grad():
        torch.testing.assert_close(one.eval()(x), other.eval()(x), rtol=1e-9, atol=1e-9)


def test_the_original_is_untouched_and_the_names_are_torchs():
    model = small_network().double()
    before = copy.deepcopy(model.state_dict())
    grown = online(model, "dbb", "3x3 5x5")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert expanded_names(grown) == ["0", "3"]
    assert not expanded_names(model)
    assert grown[3].parametrizations.weight.original.shape == model[3].weight.shape
    assert torch.equal(grown[3].weight, model[3].weight)
    kept = {name: t for name, t in grown.state_dict().items() if ".branches." not in name}
    assert set(kept) == {
        name.replace("weight", "parametrizations.weight.original")
        if name in ("0.weight", "3.weight")
        else name
        for name in before
    }


def test_copies_state_dicts_and_averages_are_networks_of_their_own(grown):
    other, average = copy.deepcopy(grown), AveragedWeights(grown, 0.9)
    again = online(small_network().double(), "dbb")
    file = io.BytesIO()
    torch.save(grown.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    average.update()
    expected = grown.eval()(X)
    with torch.no_grad():
        for p in grown.parameters():
            p.add_(1)
    for network in (other, again, average.module):
        torch.testing.assert_close(network.eval()(X), expected)
    assert (grown(X) - expected).abs().max() > 1


def test_one_graph_is_compiled(grown):
    compiled = torch.compile(grown, backend="aot_eager", fullgraph=True)
    y, expected = compiled(X), copy.deepcopy(grown)(X)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert all(p.grad is not None for p in grown.parameters())


def test_autocast_rounds_the_sum_and_not_the_kernels():
    torch.manual_seed(0)
    conv = random_scales(online(nn.Conv2d(4, 4, 3, padding=1), "dbb"))
    weight = conv.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv.weight, weight)
        y = conv(torch.randn(2, 4, 8, 8))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in conv.parameters())


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_any_padding_is_kept(mode):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, 2, 1, groups=2, padding_mode=mode).double()
    grown = random_scales(online(conv, "dbb"))
    plain = copy.deepcopy(conv)
    plain.weight = nn.Parameter(grown.weight.detach())
    assert not torch.equal(plain.weight, conv.weight)
    _same(grown, plain, torch.randn(2, 4, 9, 11, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights_grow_and_grown_weights_are_parametrized(wrap, training):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    conv = wrap(nn.Conv2d(4, 4, 3, padding=1).double()).train(training)
    before = copy.deepcopy(conv.state_dict())
    grown = online(conv, "dbb")
    assert all(torch.equal(before[name], tensor) for name, tensor in conv.state_dict().items())
    for name, tensor in before.items():
        assert torch.equal(grown.state_dict()[name], tensor), name
    assert all(m.training == training for m in grown.modules())
    torch.testing.assert_close(copy.deepcopy(grown)(x), copy.deepcopy(conv)(x))
    networks = [grown]
    if wrap is parametrizations.spectral_norm:  # torch's weight norm has to be the first one.
        networks.append(wrap(online(nn.Conv2d(4, 4, 3, padding=1).double(), "dbb")))
    for network in networks:
        network = nn.Sequential(random_scales(network), nn.ReLU()).eval()
        folded, _ = fold(network, x)
        assert type(folded[0]) is nn.Conv2d
        assert set(folded.state_dict()) == {"0.weight", "0.bias"}
        _same(folded, network, x)


class _Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_parametrized_bias_and_the_original_network_keep_working():
    """Copies of a parametrized module share its class."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1).double()).eval()
    parametrize.register_parametrization(model[0], "bias", _Twice())
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    before = model(x)
    grown = online(model, "dbb", scale=1.0)
    assert torch.equal(model(x), before)
    torch.testing.assert_close(grown(x), before)
    assert not parametrize.is_parametrized(model[0], "weight")


def test_a_scale_that_would_change_the_function_is_refused():
    conv = parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)).eval()
    with pytest.raises(ValueError, match="a parametrization that cannot be inverted; use scale=0"):
        online(nn.Sequential(conv), "repvgg", scale=1.0)
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match="the weight of 0 is shared with other modules"):
        online(model, "repvgg", scale=1.0)
    x = torch.randn(2, 4, 9, 9)
    for options in ({"where": "1", "scale": 1.0}, {"scale": 0.0}):
        torch.testing.assert_close(online(model, "repvgg", **options)(x), model(x))


def test_a_weight_computed_by_a_hook_is_refused():
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 3, 3)))
    with pytest.raises(ValueError, match="a computed weight"):
        online(model, "dbb")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_an_expanded_network_grows_again_in_either_form(first, second):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Conv2dSame(4, 4, 3, 2)).double().eval()
    once = random_scales(expand(model, "qarepvgg", online=first))
    twice = expand(once, "qarepvgg", online=second)
    _same(once, twice)
    assert expanded_names(twice) == ["0", "1"]
    kernels = [m for m in twice.modules() if isinstance(m, ChannelScale)]
    assert len(kernels) == 2 * len([m for m in once.modules() if isinstance(m, ChannelScale)])
    folded, _ = fold(random_scales(twice), X)
    assert [type(m) for m in folded] == [type(m) for m in model]
    _same(folded, twice)


@pytest.mark.parametrize("block", BLOCKS)
def test_dtype_device_mode_memory_format_and_frozen_weights_are_the_convs(block):
    model = small_network().to(torch.bfloat16).to(memory_format=torch.channels_last).eval()
    model[0].weight.requires_grad_(False)
    grown = online(model, block)
    assert not any(m.training for m in grown.modules())
    assert all(p.dtype == torch.bfloat16 for p in grown.parameters())
    assert not grown[0].parametrizations.weight.original.requires_grad
    assert any(p.requires_grad for p in grown[0].parameters())
    dense = grown[0].weight
    assert dense.is_contiguous(memory_format=torch.channels_last)
    with torch.device("meta"):
        model = small_network()
    assert all(p.is_meta for p in online(model, block).parameters())


def test_changed_classes_of_convs_keep_the_branches(grown):
    """Of convs that a CPU computes badly; see `tinydet.training.precision`."""
    other = copy.deepcopy(grown).float()
    prepare_for_cpu(other, bfloat16=True)
    assert {type(m) for m in other.modules()} != {type(m) for m in grown.modules()}
    with torch.no_grad():
        torch.testing.assert_close(other(X.float()), grown.float()(X.float()))
    folded, _ = fold(other.eval(), X.float())
    assert not any(parametrize.is_parametrized(m) for m in folded.modules())
    parametrize.remove_parametrizations(other[3], "weight")
    assert "weight" in dict(other[3].named_parameters())


def test_an_assigned_weight_is_the_sum(grown):
    weight = torch.randn_like(grown[0].weight)
    grown[0].weight = weight
    torch.testing.assert_close(grown[0].weight, weight)


@pytest.mark.parametrize("block", BLOCKS)
def test_prepared_for_a_cpu_kernels_are_still_composed(block, monkeypatch):
    """Reading them off responses to impulses takes longer than the convolution itself."""
    convs = nn.Sequential(nn.Conv2d(3, 32, 3, groups=1), nn.Conv2d(32, 32, 5, groups=32))
    grown = online(convs, block)
    prepare_for_cpu(grown, bfloat16=True)
    monkeypatch.setattr(tinydet.reparam.online, "_measured", None)
    with torch.autocast("cpu", torch.bfloat16):
        grown(torch.randn(2, 3, 20, 20)).sum().backward()
    assert all(p.grad is not None for p in grown.parameters() if p.requires_grad)
