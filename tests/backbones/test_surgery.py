"""Activations and attention in networks: where they go, and what they leave as it was."""

import copy
import io
import pickle
from abc import ABC

import pytest
import timm
import torch
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._features import FeatureHookNet
from torch import nn

from tinydet.backbones.surgery import add_attention, replace_activation
from tinydet.layers import AconC, CoordinateAttention, MetaAcon
from tinydet.reparam import fold
from tinydet.reparam.expand import expand, expanded_names
from tinydet.reparam.verify import difference


def _features(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, features_only=True, **kwargs).eval()


def _move(model):
    """Move all weights a little, as after some training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


class _Mixed(nn.Module):
    """Activations over channels in two axes, and one shared by two widths."""

    def __init__(self, shared=None):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.shared = shared or nn.SiLU(inplace=True)
        self.linear1, self.act = nn.Linear(12, 20), nn.SiLU()
        self.linear2, self.gate = nn.Linear(20, 12), nn.Sigmoid()

    def forward(self, x):
        x = self.shared(self.conv2(self.shared(self.conv1(x))))
        tokens = x.flatten(2).transpose(1, 2)
        y = self.linear2(self.act(self.linear1(tokens)))
        return x * self.gate(y).transpose(1, 2).reshape(x.shape)


def test_channels_are_found_in_any_axis_and_for_each_width_of_a_shared_activation():
    x = torch.randn(2, 3, 6, 6)
    model = _Mixed()
    changed = replace_activation(model, "acon-c", x)
    shapes = {n: tuple(p.shape) for n, p in changed.named_parameters() if n.endswith("beta")}
    assert shapes == {
        "shared.bodies.8.beta": (8,),
        "shared.bodies.12.beta": (12,),
        "act.body.beta": (20,),
    }
    assert isinstance(changed.gate, nn.Sigmoid)
    torch.testing.assert_close(changed(x), model(x))
    # Each channel has its own slope: of the linear layer's outputs, not of places.
    with torch.no_grad():
        changed.act.body.p1[3] = 5
        tokens = torch.randn(2, 36, 20)
        moved = (changed.act(tokens) - nn.functional.silu(tokens)).abs().amax((0, 1)) > 1e-3
    assert moved.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(
    ("activation", "limit"),
    [(nn.SiLU, 1e-6), (nn.ReLU, 0.05), (nn.ReLU6, 0.05), (nn.GELU, 0.05), (nn.LeakyReLU, 0.05)],
)
@pytest.mark.parametrize("kind", ["acon-b", "acon-c"])
def test_the_function_stays_near_the_one_with_the_activation_replaced(kind, activation, limit):
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(c, 32, 3, padding=1), nn.BatchNorm2d(32), activation())
        for c in (3, 32, 32, 32)
    ]
    model, x = nn.Sequential(*blocks), 8 * torch.randn(8, 3, 16, 16)
    changed = replace_activation(model, kind, x)
    assert difference(model(x), changed(x)).max_rel < limit
    swish = nn.Sequential(*copy.deepcopy(blocks))
    for block in swish:
        block[2] = nn.SiLU()
    if activation is not nn.SiLU:
        assert difference(model(x), swish(x)).max_rel > 2 * difference(model(x), changed(x)).max_rel


def test_attention_takes_the_place_of_gates_alone():
    model = _features("mobilenetv3_small_050")
    changed = add_attention(model, "coord", torch.randn(1, 3, 64, 64), "se")
    gates = {name for name, m in model.named_modules() if isinstance(m, SqueezeExcite)}
    new = {name: m for name, m in changed.named_modules() if isinstance(m, CoordinateAttention)}
    assert gates == set(new)
    for name, layer in new.items():
        assert layer.conv_h.out_channels == model.get_submodule(name).conv_expand.out_channels


def test_attention_behind_every_block_of_a_residual_network():
    x = torch.randn(1, 3, 64, 64)
    changed = add_attention(_features("test_resnet"), "coord", x, "block")
    names = [n for n, m in changed.named_modules() if isinstance(m, CoordinateAttention)]
    # The only bottleneck, layer3.0, has a conv in its shortcut and never adds its input.
    assert names == [f"layer{i}.0.attention" for i in (1, 2, 4)]
    part = add_attention(changed, "coord", x, "block", "layer4")
    names = [n for n, m in part.named_modules() if isinstance(m, CoordinateAttention)]
    assert names[-3:] == ["layer2.0.attention", "layer4.0.attention", "layer4.0.attention_2"]


class _Double(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 2.0))

    def forward(self, x):
        assert x.shape[1] == len(self.scale)
        return x * self.scale


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "regnetx_002",
        "swin_tiny_patch4_window7_224",
        pytest.param("densenet121", marks=pytest.mark.slow),
        pytest.param("hrnet_w18_small", marks=pytest.mark.slow),
    ],
)
def test_a_layer_of_ones_own_runs_once_behind_the_last_stage(name):
    x = torch.randn(1, 3, 64, 64)
    swin = {"embed_dim": 24, "depths": (1, 1, 1, 1), "strict_img_size": False}
    model = _features(name, **(swin if name.startswith("swin") else {}))
    last = {"densenet121": "features_norm5", "hrnet_w18_small": "incre_modules.3"}
    words = last.get(name, "layer4 s4 layers_3")
    changed = add_attention(model, _Double, x, "stage", words)
    with torch.no_grad():
        *others, map_ = model(x)
        *now, doubled = changed(x)
    torch.testing.assert_close(doubled, 2 * map_)
    assert all(torch.equal(a, b) for a, b in zip(others, now, strict=True))


class _Block(nn.Module, ABC):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return x + torch.relu(self.a(x) + self.b(x))


@pytest.mark.parametrize("order", [1, -1])
def test_attention_before_and_after_folding_survives_pickle(order):
    x = torch.randn(1, 3, 64, 64)
    steps = [lambda m: fold(m, x)[0], lambda m: _move(add_attention(m, "coord", x, "block"))]
    changed = nn.Sequential(_Block()).eval()
    for step in steps[::order]:
        changed = step(changed).eval()
    assert len([m for m in changed.modules() if isinstance(m, CoordinateAttention)]) == 1
    with torch.no_grad():
        for loaded in (pickle.loads(pickle.dumps(changed)), copy.deepcopy(changed)):
            assert torch.equal(loaded(x), changed(x))
            assert isinstance(loaded[0], _Block)


def test_attention_behind_code_that_is_not_its_class_s_is_refused():
    model = nn.Sequential(_Block())
    plain = model[0].forward
    model[0].forward = lambda x: plain(x)
    with pytest.raises(ValueError, match="does not run the code of its class"):
        add_attention(model, "coord", torch.randn(1, 3, 64, 64), "block")


def test_activations_beside_computed_weights_are_replaced():
    conv = torch.nn.utils.weight_norm(nn.Conv2d(3, 3, 3))
    model = nn.Sequential(conv, nn.ReLU())
    changed = replace_activation(model, "acon-c", torch.randn(1, 3, 8, 8))
    assert isinstance(changed[1], AconC)


@pytest.mark.parametrize("order", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_all_changes_one_after_the_other_fold_and_survive_pickle(order):
    torch.manual_seed(0)
    x = torch.randn(1, 3, 64, 64)
    model = _features("test_byobnet")
    steps = [
        lambda m: replace_activation(m, "acon-c", x),
        lambda m: add_attention(m, "coord", x, "stage"),
        lambda m: add_attention(m, "coord", x, "block"),
        lambda m: add_attention(m, "coord", x, "se"),
        lambda m: expand(m, "repvgg", "3x3"),
    ]
    changed = model
    for step in steps[::order]:
        changed = step(changed)
    assert expanded_names(changed)
    attention = [n for n, m in changed.named_modules() if isinstance(m, CoordinateAttention)]
    assert len(attention) == 4 + 4 + 5
    changed = _move(changed).double()
    folded, _ = fold(changed, x.double())
    assert not expanded_names(folded)
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        expected = changed(x.double())
        assert difference(expected, loaded(x.double())).max_rel < 1e-9
        assert difference(expected, copy.deepcopy(changed)(x.double())).max_rel == 0


def test_attention_behind_an_activation_stays_when_the_activation_is_replaced():
    x = torch.randn(1, 3, 64, 64)
    model = add_attention(_features("test_resnet"), "coord", x, "stage", "act1")
    changed = replace_activation(model, MetaAcon, x)
    assert isinstance(changed.act1, MetaAcon)
    assert isinstance(changed.act1.attention, CoordinateAttention)
    assert len(changed.layer1) == 1


def test_a_classifier_gets_attention_behind_the_stages_that_timm_names():
    x = torch.randn(1, 3, 64, 64)
    model = timm.create_model("test_resnet", num_classes=10).eval()
    changed = add_attention(model, "coord", x, "stage")
    names = [n for n, m in changed.named_modules() if isinstance(m, CoordinateAttention)]
    assert names == [f"{end}.attention" for end in ("act1", "layer1", "layer2", "layer3", "layer4")]
    assert torch.equal(model(x), changed(x))


def test_feature_maps_that_timm_takes_by_hooks_are_the_changed_ones():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.feature_info = [{"num_chs": 4, "reduction": 1, "module": "act"}]
            self.conv, self.act = nn.Conv2d(3, 4, 1), nn.ReLU()

        def forward(self, x):
            return self.act(self.conv(x)).mean()

    x = torch.randn(1, 3, 8, 8)
    model = FeatureHookNet(Net(), (0,))
    changed = replace_activation(model, "acon-c", x)
    again = add_attention(copy.deepcopy(changed), _Double, x, "stage")
    for net, factor in ((model, 1), (changed, 1), (again, 2)):
        conv = net.get_submodule("body.conv")
        act = net.get_submodule("body.act")
        plain = nn.ReLU() if net is model else AconC.like(nn.ReLU(), 4)
        assert isinstance(act, type(plain))
        torch.testing.assert_close(net(x)[0], factor * plain(conv(x)))


@pytest.mark.slow
def test_export_gives_the_same_function():
    x = torch.randn(1, 3, 64, 64)
    model = _move(add_attention(_features("test_resnet"), "coord", x, "block"))
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        assert difference(model(x), exported(x)).max_rel < 1e-6


class _Overwrites(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.conv(x)
        return x + self.act(x)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m, x: replace_activation(m, "acon", x), "did you mean acon-"),
        (lambda m, x: replace_activation(m, "acon-c", x, "layr4"), "did you mean layer4"),
        (lambda _, x: replace_activation(_Overwrites(), "acon-c", x), "overwriting its input"),
        (lambda _, x: replace_activation(nn.Conv2d(3, 3, 1), "acon-c", x), "no activation"),
        (lambda m, x: replace_activation(m, lambda c: nn.Conv2d(c, 2, 1), x), "fails on the"),
        (lambda m, x: add_attention(m, "cord", x, "stage"), "did you mean coord"),
        (lambda m, x: add_attention(m, "coord", x, "stages"), "did you mean stage"),
        (lambda m, x: add_attention(m, "coord", x, "se"), "no such place"),
        (lambda m, x: add_attention(m, "coord", x, "block", "act1"), "selects none of the 3"),
        (lambda m, x: add_attention(m, lambda c: nn.Conv2d(c, 2, 1), x, "stage"), "stage|fails"),
        (lambda _, x: add_attention(nn.ReLU(), "coord", x, "block"), "no such place"),
    ],
)
def test_errors_are_one_line(change, words):
    with pytest.raises(ValueError, match=words) as error:
        change(_features("test_resnet"), torch.randn(1, 3, 64, 64))
    assert "\n" not in str(error.value)
