"""Counts against closed forms; what thop and torch see differently."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tinydet.config import VOC_CLASSES, Data, Experiment, Model
from tinydet.deployment import flops
from tinydet.deployment.flops import compare_counters, count, flops_lines
from tinydet.deployment.fold_checkpoint import assumed_classes, both_forms
from tinydet.reparam import expand
from tinydet.reparam.expand import ExpandedConv2d


def _images(height=12, width=20):
    return torch.randn(1, 3, height, width)


# Multiply-adds of a conv: output pixels * output channels * input channels a group * kernel area.
@pytest.mark.parametrize(
    ("layer", "params", "macs"),
    [
        (nn.Conv2d(3, 8, 3), 8 * 3 * 9 + 8, 10 * 18 * 8 * 3 * 9),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), 216, 6 * 10 * 8 * 3 * 9),
        (nn.Conv2d(3, 9, (5, 1), groups=3), 9 * 5 + 9, 8 * 20 * 9 * 1 * 5),
        (nn.Conv2d(3, 3, 3, dilation=2, groups=3), 27 + 3, 8 * 16 * 3 * 9),
        (nn.Linear(20, 7), 20 * 7 + 7, 3 * 12 * 20 * 7),
        (nn.ReLU(), 0, 0),
    ],
)
def test_count__closed_forms(layer, params, macs):
    counted = count(layer, _images())
    assert counted.params == params
    assert counted.multiply_adds == macs
    assert sum(counted.by_thop.values()) == macs
    assert compare_counters(counted).endswith(": they agree")


def test_count__grows_with_the_batch_and_is_kept_apart_by_class():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 240, 5))
    one, two = count(model, _images()), count(model, torch.randn(2, 3, 12, 20))
    assert one.by_torch == {"Conv2d": 240 * 3 * 4, "Linear": 960 * 5}
    assert two.multiply_adds == 2 * one.multiply_adds
    assert two.params == one.params


class _Functional(nn.Module):
    """Its conv thop knows; its matrix product is no module."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.weight = nn.Parameter(torch.zeros(6, 20))

    def forward(self, x):
        return F.linear(self.conv(x), self.weight)


def test_compare_counters__names_what_thop_misses():
    counted = count(_Functional(), _images())
    unseen = 4 * 12 * 20 * 6  # F.linear: rows * in * out
    assert counted.by_torch == {"Conv2d": 2880, "_Functional": unseen}
    assert counted.by_thop == {"Conv2d": 2880}
    line = compare_counters(counted)
    assert line == (
        f"thop counts {2880 / 1e9:.3g} G, torch {(2880 + unseen) / 1e9:.3g} G: they differ in "
        f"_Functional (0 G, torch {unseen / 1e9:.3g} G)"
    )


def test_compare_counters__an_expanded_conv_is_missed_but_its_branches_are_not():
    model = expand(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), "repvgg").eval()
    counted = count(model, _images())
    kernel = 240 * 4 * 3 * 9
    assert counted.by_torch[ExpandedConv2d.__name__] == kernel
    assert ExpandedConv2d.__name__ not in counted.by_thop
    assert counted.by_thop["Conv2d"] == counted.by_torch["Conv2d"] == 240 * 4 * 3
    line = compare_counters(counted)
    assert f"they differ in ExpandedConv2d (0 G, torch {kernel / 1e9:.3g} G), " in line
    assert f"BatchNorm2d ({counted.by_thop['BatchNorm2d'] / 1e9:.3g} G, torch 0 G)" in line


def test_compare_counters__counts_differently():
    # thop multiplies a transposed conv's output, torch (rightly) its input, by the kernel.
    counted = count(nn.ConvTranspose2d(3, 3, 2, stride=2), _images())
    assert counted.multiply_adds == 240 * 3 * 3 * 4
    line = compare_counters(counted)
    assert f"ConvTranspose2d ({4 * 8640 / 1e9:.3g} G, torch {8640 / 1e9:.3g} G)" in line


class _Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(input=x)


def test_count__thop_fails_and_torch_counts_alone():
    counted = count(_Keyword(), _images())
    assert counted.multiply_adds == 2880
    assert "thop cannot count this network (IndexError" in compare_counters(counted)


class _LooksAtValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x) if x.sum().item() > 0 else x


def test_count__a_network_that_looks_at_values_is_run_on_them():
    assert count(_LooksAtValues(), torch.ones(1, 3, 12, 20)).multiply_adds == 2880
    assert count(_LooksAtValues(), -torch.ones(1, 3, 12, 20)).multiply_adds == 0


class _Attends(nn.Module):
    """Attention of several kinds, in a network that looks at values."""

    def __init__(self, kind):
        super().__init__()
        layers = {
            "fused": nn.Identity,
            "module": lambda: nn.MultiheadAttention(16, 4, batch_first=True),
            "layer": lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
            "lstm": lambda: nn.LSTM(16, 8, batch_first=True),
        }
        self.kind, self.layer = kind, layers[kind]()

    def forward(self, x):
        assert x.sum().item() < 1e9
        if self.kind == "fused":
            return F.scaled_dot_product_attention(x, x, x)
        return self.layer(x, x, x) if self.kind == "module" else self.layer(x)


_PROJECTIONS, _ATTENTION = 4 * 10 * 16 * 16, 2 * 2 * 5 * 5 * 16


@pytest.mark.parametrize(
    ("kind", "macs"),
    [
        ("fused", _ATTENTION),
        ("module", _PROJECTIONS + _ATTENTION),
        ("layer", _PROJECTIONS + _ATTENTION + 2 * 10 * 16 * 32),
        ("lstm", 10 * 4 * 8 * (16 + 8)),
    ],
)
def test_count__kernels_that_hide_their_products(kind, macs):
    x = torch.randn(2, 5, 16)
    assert count(_Attends(kind), x).multiply_adds == macs


def test_count__leaves_the_model_as_it_was_and_prints_nothing(capfd):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Hardswish(), _Functional())
    model[3].conv = nn.Conv2d(4, 4, 1)
    model.train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count(model, _images())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [m.training for m in model] == [True, False, True, True]
    for module in model.modules():
        assert not hasattr(module, "total_ops")
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("data", "classes"),
    [
        (Data(classes=("cat", "dog"), source="shapes"), 2),
        (Data(classes=(), source="shapes"), 6),
        (Data(classes=(), source="folder"), len(VOC_CLASSES)),
    ],
)
def test_assumed_classes(data, classes):
    assert len(assumed_classes(Experiment(data=data))) == classes


@pytest.fixture(scope="module")
def experiment():
    model = Model("test_resnet", "/nowhere.pt", encoder_channels=16, encoder_mid_channels=8)
    return Experiment(name="tiny", model=model, data=Data(root="nowhere"))


def test_flops_lines__needs_neither_data_nor_weights(experiment, monkeypatch):
    forms = both_forms(experiment)
    monkeypatch.setattr(flops, "both_forms", lambda _: forms)
    lines = list(flops_lines(experiment, (64, 96)))
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:5]}
    images = torch.zeros(1, 3, 64, 96)
    for name, form in zip(("training", "deploy"), forms, strict=True):
        params = sum(p.numel() for p in form.parameters())
        adds = count(form, images).multiply_adds
        assert rows[name] == [f"{params / 1e6:.2f}", f"{adds / 1e9:.2f}"]
    assert "tiny" in lines[0]
    assert "1x3x64x96, 20 classes (its own)" in lines[1]
    assert [line.split()[0] for line in lines[-2:]] == ["training:", "deploy:"]
    assert all(" thop counts " in line for line in lines[-2:])
    assert "BatchNorm2d" in lines[-2]
    assert "BatchNorm2d" not in lines[-1]


@pytest.mark.parametrize("size", [(64, 65), (0, 0), (-32, 32)])
def test_flops_lines__size(experiment, size):
    with pytest.raises(ValueError, match=f"--shape {size[0]} {size[1]}: both must be multiples"):
        next(flops_lines(experiment, size))
